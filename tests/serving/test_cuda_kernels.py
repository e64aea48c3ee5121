"""cuSPARSELt and CUTLASS without a card.

torch has these operators for CUDA only. Here they get a reference for the CPU, so that our kernels
and torch's own semi-structured classes run the same way they do on a card, but for the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparseserve.serving.kernels import BATCHES, LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cuda import CUDA_KERNELS
from sparseserve.serving.kernels.cuda_device import CudaDevice
from sparseserve.serving.kernels.cusparselt import CusparseltKernel, cusparselt_refusal
from sparseserve.serving.kernels.cutlass import CutlassKernel, cutlass_refusal
from sparseserve.serving.kernels.operands import pad_batch
from sparseserve.serving.kernels.trial import trial_refusal
from sparseserve.serving.kernels.triton_packed import triton_refusal
from sparseserve.sparsity import TWO_FOUR, Packed24, pack24, unpack24

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*SparseSemiStructuredTensor.*:UserWarning", "ignore:.*sparse.*:UserWarning"
)

ON_TORCH: list[CusparseltKernel | CutlassKernel] = [
    CusparseltKernel(),
    CusparseltKernel(1, 3),
    CutlassKernel(),
]
AMPERE = CudaDevice("A100", (8, 0), 108, 800)
HOPPER = CudaDevice("H100", (9, 0), 132, 800)
TURING = CudaDevice("T4", (7, 5), 40, 800)
BARE = CudaDevice("A100", (8, 0), 108, None)
REFUSALS = {"triton": triton_refusal, "cusparselt": cusparselt_refusal, "cutlass": cutlass_refusal}


def compress(dense: Tensor) -> Tensor:
    """Values, then positions: of the size of cuSPARSELt's form, in an order of our own."""
    packed = pack24(dense)
    return torch.cat([packed.values.flatten(), packed.indices.flatten().view(dense.dtype)])


def cslt_multiply(  # noqa: PLR0917  # the operator's signature
    compressed: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    # What the operator asks on a card, and does not say.
    assert right.shape[1] % 8 == 0
    assert right.dtype == compressed.dtype
    assert (split_k_mode == 2) == (split_k > 1)
    columns = right.shape[0]
    rows = compressed.numel() * 16 // 9 // columns
    flat = compressed.flatten()
    values, codes = flat[: rows * columns // 2], flat[rows * columns // 2 :]
    packed = Packed24(values.view(rows, -1), codes.view(torch.uint8).view(rows, -1))
    product = unpack24(packed).float() @ right.float()
    if bias is not None:
        product += bias.float()[:, None]
    product = product.to(right.dtype)
    return product.t().contiguous() if transpose_result else product


def cutlass_multiply(
    values: Tensor, metadata: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    assert right.shape[1] % 8 == 0
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return (dense.float() @ right.float()).to(right.dtype)


def cutlass_multiply_add(
    bias: Tensor,
    values: Tensor,
    metadata: Tensor,
    right: Tensor,
    *,
    alpha: float = 1,
    beta: float = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    assert right.shape[1] % 8 == 0
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return (dense.float() @ right.float() + bias.float()[:, None]).to(right.dtype)


@pytest.fixture(scope="module", autouse=True)
def reference_operators() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    impl: Callable[..., None] = library.impl
    impl("_cslt_compress", compress, "CPU")
    impl("_cslt_sparse_mm", cslt_multiply, "CPU")
    impl("_sparse_semi_structured_mm", cutlass_multiply, "CPU")
    impl("_sparse_semi_structured_addmm", cutlass_multiply_add, "CPU")
    yield
    library._destroy()  # type: ignore[no-untyped-call]


def two_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns)).to(dtype)


def spec_of(
    rows: int = 64,
    columns: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    two_four: bool = True,
) -> LinearSpec:
    return LinearSpec(rows, columns, dtype, torch.device("cpu"), two_four)


def pack(kernel: LinearKernel, weight: Tensor) -> tuple[Tensor, ...]:
    return kernel.pack(loaded(weight), spec_of(len(weight), weight.shape[1], weight.dtype))


def loaded(*weights: Tensor | Packed24) -> LoadedWeight:
    return LoadedWeight(tuple(RowBlock(str(i), weight) for i, weight in enumerate(weights)))


@pytest.mark.parametrize("batch", [1, 2, 7, 8, 16, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_products_are_those_of_the_dense_weight(
    kernel: LinearKernel, dtype: torch.dtype, biased: bool, batch: int
) -> None:
    weight, inputs = two_four(96, 128, dtype), torch.randn(batch, 128).to(dtype)
    bias = torch.randn(96).to(dtype) if biased else None
    found = kernel.matmul(pack(kernel, weight), inputs, bias, 96)
    expected = linear(inputs.float(), weight.float(), None if bias is None else bias.float())
    assert found.shape == (batch, 96)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_an_empty_batch_gives_an_empty_result(kernel: LinearKernel) -> None:
    packed = pack(kernel, two_four(32, 64))
    assert kernel.matmul(packed, torch.empty(0, 64).bfloat16(), None, 32).shape == (0, 32)


@pytest.mark.parametrize("kernel", CUDA_KERNELS.values(), ids=CUDA_KERNELS)
def test_packed_and_dense_blocks_pack_alike_into_nine_sixteenths(kernel: LinearKernel) -> None:
    top, bottom = two_four(32, 128), two_four(64, 128)
    spec = spec_of(96, 128)
    whole = kernel.pack(loaded(torch.cat([top, bottom])), spec)
    blocks = kernel.pack(loaded(pack24(top), bottom), spec)
    assert all(torch.equal(one, other) for one, other in zip(whole, blocks, strict=True))
    assert all(tensor.is_contiguous() for tensor in whole)
    assert sum(tensor.nbytes for tensor in whole) == 96 * 128 * 2 * 9 // 16


def test_kernels_of_one_layout_pack_alike() -> None:
    weight, forms = loaded(two_four(64, 128)), dict[str, tuple[Tensor, ...]]()
    for kernel in CUDA_KERNELS.values():
        packed = kernel.pack(weight, spec_of(64, 128))
        first = forms.setdefault(kernel.layout, packed)
        assert all(torch.equal(one, other) for one, other in zip(first, packed, strict=True))
    assert set(forms) == {"packed24", "cusparselt", "cutlass"}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kernel", "theirs"),
    [
        (CusparseltKernel(), SparseSemiStructuredTensorCUSPARSELT),
        (CutlassKernel(), SparseSemiStructuredTensorCUTLASS),
    ],
    ids=["cusparselt", "cutlass"],
)
def test_torchs_own_class_packs_and_multiplies_alike(
    monkeypatch: pytest.MonkeyPatch,
    kernel: LinearKernel,
    theirs: type[SparseSemiStructuredTensor],
    biased: bool,
) -> None:
    # Its conversion refuses the CPU; the operators behind it are ours here.
    monkeypatch.setattr(theirs, "_validate_device_dim_dtype_shape", lambda _: None)
    weight, inputs = two_four(64, 128), torch.randn(5, 128).bfloat16()
    bias = torch.randn(64).bfloat16() if biased else None
    sparse = theirs.from_dense(weight)
    ours = pack(kernel, weight)
    assert sparse.packed is not None
    assert torch.equal(sparse.packed.flatten(), ours[0].flatten())
    if sparse.meta is not None:
        assert torch.equal(sparse.meta, ours[1])
    assert torch.equal(linear(inputs, sparse, bias), kernel.matmul(ours, inputs, bias, 64))


def test_cutlass_packing_is_torchs_conversion_and_can_be_undone() -> None:
    weight = two_four(64, 128)
    values, metadata = pack(CutlassKernel(), weight)
    back = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    assert torch.equal(back, weight)
    assert torch.equal(values, pack24(weight).values)


@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_a_weight_that_is_not_two_four_is_not_cut_down_in_silence(kernel: LinearKernel) -> None:
    with pytest.raises(ValueError, match="not 2:4 at row 0"):
        pack(kernel, torch.ones(64, 128).bfloat16())


@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_a_weight_of_another_width_is_not_packed(kernel: LinearKernel) -> None:
    with pytest.raises(ValueError, match="multiples of"):
        pack(kernel, two_four(64, 120))


Wrong = Callable[[tuple[Tensor, ...], Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor, Tensor]]
WRONG: dict[str, Wrong] = {
    "inputs of another dtype": lambda packed, x, b: (packed, x.half(), b),
    "fewer input features": lambda packed, x, b: (packed, x[:, :64].contiguous(), b),
    "inputs that are not contiguous": lambda packed, x, b: (packed, x.t().contiguous().t(), b),
    "fewer rows": lambda packed, x, b: (tuple(t[:32] for t in packed), x, b),
    "a bias of another length": lambda packed, x, b: (packed, x, b[:32]),
    "a bias of another dtype": lambda packed, x, b: (packed, x, b.float()),
    "packed tensors of another dtype": lambda packed, x, b: (tuple(t.int() for t in packed), x, b),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_wrong_operands_are_refused_also_while_tracing(
    kernel: LinearKernel, fake: bool, wrong: str
) -> None:
    packed = pack(kernel, two_four(64, 128))
    operands = packed, torch.randn(8, 128).bfloat16(), torch.randn(64).bfloat16()
    if not fake:
        with pytest.raises(ValueError, match=r"but the layer takes|not contiguous"):
            kernel.matmul(*WRONG[wrong](*operands), 64)
        return
    with FakeTensorMode() as mode:
        faked = (
            tuple(mode.from_tensor(tensor) for tensor in packed),
            mode.from_tensor(operands[1]),
            mode.from_tensor(operands[2]),
        )
        with pytest.raises(ValueError, match=r"but the layer takes|not contiguous"):
            kernel.matmul(*WRONG[wrong](*faked), 64)


@pytest.mark.parametrize("batch", [1, 8, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_fake_tensors_get_the_shape_of_the_product(
    kernel: LinearKernel, biased: bool, batch: int
) -> None:
    # Fake tensors of a CUDA device cannot be cut by a torch that is built for the CPU alone.
    packed = [torch.empty_like(one, device="meta") for one in pack(kernel, two_four(64, 128))]
    inputs = torch.empty(batch, 128, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(64, dtype=torch.bfloat16, device="meta") if biased else None
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*packed, inputs)]
        fake_bias = None if bias is None else mode.from_tensor(bias)
        found = kernel.matmul(fakes[:-1], fakes[-1], fake_bias, 64)
        assert found.shape == (batch, 64)
        assert found.dtype == torch.bfloat16
        assert found.is_contiguous()


@pytest.mark.parametrize("kernel", ON_TORCH, ids=repr)
def test_operands_of_two_devices_are_refused(kernel: LinearKernel) -> None:
    packed, inputs = pack(kernel, two_four(64, 128)), torch.randn(8, 128).bfloat16()
    with pytest.raises(ValueError, match="on cpu, but the weight is on meta"):
        kernel.matmul(packed, inputs.to("meta"), None, 64)


@pytest.mark.parametrize(("batch", "padded"), [(0, 8), (1, 8), (8, 8), (9, 16)])
def test_batches_are_padded_with_zeros(batch: int, padded: int) -> None:
    inputs = torch.randn(batch, 4)
    found = pad_batch(inputs, 8)
    assert found.shape == (padded, 4)
    assert torch.equal(found[:batch], inputs)
    assert not found[batch:].any()


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
        "sparseserve.serving.kernels.cusparselt._OLDEST_ARGUMENT", "an argument of the future"
    )
    assert "too old" in str(cusparselt_refusal(spec_of(), AMPERE))


def test_names_of_kernels_can_stand_in_a_plan() -> None:
    assert not any(set(name) & set(",;") for name in CUDA_KERNELS)


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
    from sparseserve.serving.kernels import cuda_device

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
