"""Every kernel for cards against a float64 product of the unpacked weight, on the card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels import LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cuda.cutlass import CutlassKernel
from sparseserve.serving.kernels.cuda.device import cuda_device
from sparseserve.serving.kernels.cuda.table import CUDA_KERNELS
from sparseserve.serving.kernels.cuda.triton_packed import TritonKernel, TritonUnpackKernel
from sparseserve.serving.kernels.dense import DenseKernel
from sparseserve.sparsity import TWO_FOUR

pytestmark = pytest.mark.gpu

KERNELS: dict[str, LinearKernel] = {"dense": DenseKernel(), **CUDA_KERNELS}
DTYPES = (torch.float16, torch.bfloat16)
# SmolLM2-135M's, and one of Llama-3-8B's.
SHAPES = [(576, 576), (960, 576), (576, 1536), (4096, 14336)]
BATCHES = (1, 2, 7, 8, 16, 33, 64, 100, 512, 1000)
ON_PACKED24 = {name: k for name, k in CUDA_KERNELS.items() if k.layout == "packed24"}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def sums_in_float32() -> Iterator[None]:
    """Keep cuBLAS from adding parts of a sum in 16 bits, which torch lets it do by default.

    The products of ``dense`` and ``triton_unpack`` are torch's own; what is tested is the weight
    that they multiply.
    """
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in before.items():
        setattr(matmul, name, value)


def two_four(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns, device="cuda")).to(dtype)


def spec_of(weight: Tensor) -> LinearSpec:
    rows, columns = weight.shape
    return LinearSpec(rows, columns, weight.dtype, weight.device, two_four=True)


def pack_or_skip(kernel: LinearKernel, weight: Tensor) -> tuple[Tensor, ...]:
    """Pack, or skip what the device lacks. Wrong products of a trial are a failure."""
    reason = kernel.unsupported(spec_of(weight))
    if reason is not None:
        assert "wrong products" not in reason
        pytest.skip(reason)
    return kernel.pack(LoadedWeight((RowBlock("a", weight),)), spec_of(weight))


def assert_within_rounding(
    found: Tensor, weight: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> None:
    """Bound the error by two roundings of the output and the float32 roundings of the sum.

    Two, because a library that splits the sum may keep its parts in 16 bits.
    """
    exact = inputs.double() @ weight.double().T
    size = inputs.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    kind = torch.finfo(found.dtype)
    # Tensor cores cut rather than round while they add: a whole unit for each step.
    steps = (weight.shape[1] + 8) * torch.finfo(torch.float32).eps
    bound = kind.eps * exact.abs() + 2 * steps * size + kind.smallest_normal
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_products_are_within_rounding(
    name: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight, bias = two_four(rows, columns, dtype), torch.randn(rows, device="cuda").to(dtype)
    packed = pack_or_skip(KERNELS[name], weight)
    for batch in BATCHES:
        inputs = torch.randn(batch, columns, device="cuda").to(dtype)
        for offset in (None, bias):
            found = KERNELS[name].matmul(packed, inputs, offset, rows)
            assert found.shape == (batch, rows)
            assert found.is_contiguous()
            assert_within_rounding(found, weight, inputs, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (70, 132), (130, 1036)])
@pytest.mark.parametrize("name", ON_PACKED24)
def test_odd_shapes_are_within_rounding(
    name: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = two_four(rows, columns, dtype)
    packed = pack_or_skip(KERNELS[name], weight)
    for batch in (1, 3, 65):
        inputs = torch.randn(batch, columns, device="cuda").to(dtype)
        assert_within_rounding(KERNELS[name].matmul(packed, inputs, None, rows), weight, inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_large_terms_that_cancel_leave_the_small_ones(name: str) -> None:
    weight = torch.zeros(64, 512, device="cuda", dtype=torch.bfloat16)
    weight[:, 0], weight[:, 5], weight[:, 511] = 4096, -4096, 0.5
    packed = pack_or_skip(KERNELS[name], weight)
    inputs = torch.ones(16, 512, device="cuda", dtype=torch.bfloat16)
    found = KERNELS[name].matmul(packed, inputs, None, 64)
    assert torch.equal(found, torch.full_like(found, 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ON_PACKED24)
def test_denormal_weights_are_not_lost(name: str, dtype: torch.dtype) -> None:
    weight = torch.zeros(64, 64, device="cuda", dtype=dtype)
    weight[:, 2] = torch.finfo(dtype).tiny / 4
    packed = pack_or_skip(KERNELS[name], weight)
    inputs = torch.full((8, 64), 64.0, device="cuda", dtype=dtype)
    found = KERNELS[name].matmul(packed, inputs, None, 64)
    assert torch.equal(found, torch.full_like(found, torch.finfo(dtype).tiny * 16))


@pytest.mark.parametrize("batch", [1, 8, 64, 512])
@pytest.mark.parametrize("name", KERNELS)
def test_a_captured_graph_gives_the_products_of_new_inputs(name: str, batch: int) -> None:
    weight = two_four(576, 1536, torch.bfloat16)
    packed = pack_or_skip(KERNELS[name], weight)
    inputs = torch.randn(batch, 1536, device="cuda").bfloat16()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        KERNELS[name].matmul(packed, inputs, None, 576)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = KERNELS[name].matmul(packed, inputs, None, 576)
    inputs.copy_(torch.randn(batch, 1536, device="cuda"))
    graph.replay()
    assert_within_rounding(captured, weight, inputs)


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_product_is_the_same_every_time(name: str) -> None:
    weight = two_four(576, 4096, torch.bfloat16)
    packed = pack_or_skip(KERNELS[name], weight)
    inputs = torch.randn(16, 4096, device="cuda").bfloat16()
    first = KERNELS[name].matmul(packed, inputs, None, 576)
    for _ in range(5):
        assert torch.equal(KERNELS[name].matmul(packed, inputs, None, 576), first)


def test_packing_on_the_card_is_packing_on_the_cpu() -> None:
    weight = two_four(64, 128, torch.bfloat16)
    on_cpu = pack24(weight.cpu())
    values, indices = TritonKernel().pack(LoadedWeight((RowBlock("a", weight),)), spec_of(weight))
    assert torch.equal(values.cpu(), on_cpu.values)
    assert torch.equal(indices.cpu(), on_cpu.indices)
    values, metadata = CutlassKernel().pack(LoadedWeight((RowBlock("a", weight),)), spec_of(weight))
    back = sparse_semi_structured_to_dense_cutlass(values.cpu(), metadata.cpu())  # type: ignore[no-untyped-call]
    assert torch.equal(back, weight.cpu())


def test_the_kernels_that_this_card_should_have_are_offered() -> None:
    device = cuda_device(torch.device("cuda"))
    assert device is not None
    if device.capability < (8, 0):
        pytest.skip(f"no 2:4 kernel is for {device}")
    spec = spec_of(two_four(576, 1536, torch.bfloat16))
    assert TritonKernel().unsupported(spec) is None
    assert TritonUnpackKernel().unsupported(spec) is None
    if device.capability[0] == 8:
        assert CutlassKernel().unsupported(spec) is None
    if device.cusparselt is not None:
        names = [n for n, k in CUDA_KERNELS.items() if n.startswith("cusparselt")]
        assert any(CUDA_KERNELS[name].unsupported(spec) is None for name in names)
