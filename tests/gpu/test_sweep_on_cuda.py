"""The kernel sweep measures every kernel of this card at every batch size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import kernel_sweep
from sparseserve.serving.kernels import KERNELS, LinearSpec

pytestmark = pytest.mark.gpu


def test_every_kernel_is_measured_at_every_batch_size() -> None:
    spec = LinearSpec(512, 1024, torch.bfloat16, torch.device("cuda"), two_four=True)
    batches = (1, 16, 64)
    found = kernel_sweep.layer_result(
        KERNELS, spec, model="m", linear="l", batches=batches, repeats=2
    )
    assert not [refused for refused in found.refusals if " at batch " in refused]
    assert {(one.kernel, one.batch) for one in found.measurements} == {
        (name, batch)
        for name in found.errors
        for batch in batches
        if (KERNELS[name].largest_batch or batch) >= batch
    }
