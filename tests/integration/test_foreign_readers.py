"""Programs that never heard of sparseserve, and a checkpoint of ours."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.conftest import Prune


def logits(folder: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(10, 74)[None]).logits
    return found


def test_plain_transformers_reads_a_dense_export(prune: Prune) -> None:
    dense = prune("llama", "dense", export_format="dense").path
    assert torch.equal(logits(dense), logits(dense))


@pytest.mark.xfail(strict=True, reason="transformers draws what it cannot read at random")
def test_plain_transformers_reads_packed24_as_its_dense_export_or_refuses_it(prune: Prune) -> None:
    dense = prune("llama", "dense", export_format="dense").path
    packed = prune("llama", "packed", export_format="packed24").path
    try:
        found = logits(packed)
    except (OSError, ValueError, ImportError):
        return
    assert torch.equal(found, logits(dense))
