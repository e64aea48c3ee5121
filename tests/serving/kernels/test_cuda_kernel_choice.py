"""What a card and a layer allow is known, and a kernel is tried, before it is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from sparseserve.serving.kernels import BATCHES, LinearKernel, LinearSpec, LoadedWeight
from sparseserve.serving.kernels.cuda.cusparselt import CusparseltKernel, cusparselt_refusal
from sparseserve.serving.kernels.cuda.cutlass import CutlassKernel, cutlass_refusal
from sparseserve.serving.kernels.cuda.device import CudaDevice
from sparseserve.serving.kernels.cuda.table import CUDA_KERNELS
from sparseserve.serving.kernels.cuda.trial import trial_refusal
from sparseserve.serving.kernels.cuda.triton_packed import triton_refusal
from sparseserve.sparsity import TWO_FOUR
from tests.serving.torch_operators import ON_TORCH, spec_of

pytestmark = [
    pytest.mark.usefixtures("torch_operators"),
    pytest.mark.filterwarnings("ignore:.*[sS]parse.*:UserWarning"),
]
AMPERE = CudaDevice("A100", (8, 0), 108, 800)
HOPPER = CudaDevice("H100", (9, 0), 132, 800)
TURING = CudaDevice("T4", (7, 5), 40, 800)
BARE = CudaDevice("A100", (8, 0), 108, None)
REFUSALS = {"triton": triton_refusal, "cusparselt": cusparselt_refusal, "cutlass": cutlass_refusal}


@pytest.mark.parametrize(
    ("name", "device", "spec", "reason"),
    [
        *((name, None, spec_of(), "needs an NVIDIA GPU") for name in REFUSALS),
        *((name, AMPERE, spec_of(dtype=torch.float32), "not float32") for name in REFUSALS),
        *((name, AMPERE, spec_of(two_four=False), "module .* is dense") for name in REFUSALS),
        ("triton", TURING, spec_of(), r"8\.0 or more, not T4 \(compute capability 7\.5\)"),
        ("cusparselt", TURING, spec_of(), r"8\.0 or more, not T4 \(compute capability 7\.5\)"),
        ("cutlass", TURING, spec_of(), r"8\.x, not T4"),
        ("cutlass", HOPPER, spec_of(), r"8\.x, not H100 \(compute capability 9\.0\)"),
        ("cusparselt", BARE, spec_of(), "built without cuSPARSELt"),
        ("triton", AMPERE, spec_of(5, 6), "multiples of 4, not 5 x 6"),
        ("cusparselt", AMPERE, spec_of(24, 32), "multiples of 16 .* not 24 x 32"),
        ("cusparselt", AMPERE, spec_of(32, 24), "multiples of 16, not 32 x 24"),
        ("cutlass", AMPERE, spec_of(48, 64), "multiples of 32 .* not 48 x 64"),
        ("cutlass", AMPERE, spec_of(32, 96), "multiples of 64, not 32 x 96"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    name: str, device: CudaDevice | None, spec: LinearSpec, reason: str
) -> None:
    pytest.importorskip("triton")
    found = REFUSALS[name](spec, device)
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    ("name", "device", "spec"),
    [
        ("triton", AMPERE, spec_of(5, 4)),
        ("triton", HOPPER, spec_of(576, 1536, torch.float16)),
        ("cusparselt", AMPERE, spec_of(16, 16)),
        ("cusparselt", HOPPER, spec_of(192, 576)),
        ("cutlass", AMPERE, spec_of(32, 64)),
    ],
)
def test_what_can_be_run_is_not_refused(name: str, device: CudaDevice, spec: LinearSpec) -> None:
    pytest.importorskip("triton")
    assert REFUSALS[name](spec, device) is None


@pytest.mark.parametrize("kernel", CUDA_KERNELS.values(), ids=CUDA_KERNELS)
def test_no_kernel_for_cards_offers_to_run_on_a_cpu(kernel: LinearKernel) -> None:
    assert kernel.unsupported(spec_of()) == "needs an NVIDIA GPU, the layer is on cpu"


def test_torch_without_splits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparseserve.serving.kernels.cuda.cusparselt._OLDEST_ARGUMENT", "an argument of the future"
    )
    assert "too old" in str(cusparselt_refusal(spec_of(), AMPERE))


@dataclass(frozen=True, slots=True)
class Faulty:
    """Multiplies as it should, up to a batch size."""

    layout: ClassVar[str] = "dense"

    largest_batch: int | None = None
    wrong_from: int = 10**9
    broken_from: int = 10**9
    forgets_bias: bool = False

    def unsupported(self, spec: LinearSpec) -> str | None:
        return trial_refusal(self, spec)

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        assert TWO_FOUR.first_violation(weight.dense()) is None
        return (weight.dense(),)

    def matmul(
        self, packed: tuple[Tensor, ...], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        if len(inputs) >= self.broken_from:
            raise RuntimeError("no such algorithm\nand a long trace")
        weight = packed[0].flip(1) if len(inputs) >= self.wrong_from else packed[0]
        return linear(inputs, weight, None if self.forgets_bias else bias)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Faulty(), None),
        (Faulty(wrong_from=64), "gives wrong products at batch 64 on cpu"),
        (Faulty(forgets_bias=True), "gives wrong products at batch 1 on cpu"),
        (Faulty(broken_from=512), "fails on cpu: no such algorithm"),
        (Faulty(broken_from=512, largest_batch=256), None),
    ],
)
@pytest.mark.parametrize("rows", [24, 1056])
def test_a_kernel_is_trusted_only_after_a_trial(
    kernel: Faulty, reason: str | None, rows: int
) -> None:
    assert kernel.unsupported(spec_of(rows, 64)) == reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_the_trial_passes_what_is_right(
    kernel: CusparseltKernel | CutlassKernel, dtype: torch.dtype
) -> None:
    assert max(BATCHES) >= 512
    assert trial_refusal(kernel, spec_of(64, 2048, dtype)) is None


def test_the_device_is_described_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseserve.serving.kernels.cuda import device as cuda_device

    @dataclass
    class Properties:
        name: str = "A100"
        major: int = 8
        minor: int = 0
        multi_processor_count: int = 108

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    cuda_device._describe.cache_clear()
    try:
        found = cuda_device.cuda_device(torch.device("cuda"))
        assert found == AMPERE
        assert cuda_device.cuda_device(torch.device("cuda", 0)) is found
    finally:
        cuda_device._describe.cache_clear()
    assert cuda_device.cuda_device(torch.device("cpu")) is None
