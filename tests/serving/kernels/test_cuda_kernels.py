"""cuSPARSELt and CUTLASS multiply, without a card."""

from __future__ import annotations

from collections.abc import Callable

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

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.errors import ServingError
from sparseserve.serving.kernels import LinearKernel
from sparseserve.serving.kernels.cuda.cusparselt import CusparseltKernel
from sparseserve.serving.kernels.cuda.cutlass import CutlassKernel
from sparseserve.serving.kernels.cuda.operands import pad_batch
from sparseserve.serving.kernels.cuda.table import CUDA_KERNELS
from tests.serving.torch_operators import ON_TORCH, loaded, pack, spec_of, two_four

pytestmark = [
    pytest.mark.usefixtures("torch_operators"),
    pytest.mark.filterwarnings("ignore:.*[sS]parse.*:UserWarning"),
]


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
    with pytest.raises((ValueError, ServingError), match="not 2:4 at row 0"):
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


def test_names_of_kernels_can_stand_in_a_plan() -> None:
    assert not any(set(name) & set(",;") for name in CUDA_KERNELS)
