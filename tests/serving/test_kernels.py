from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sparseserve.errors import ServingError
from sparseserve.sparsity import TWO_FOUR, pack24, unpack24

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def spec(*, two_four: bool = True) -> object:
    from sparseserve.serving.kernels import LinearSpec

    return LinearSpec(8, 16, torch.float32, torch.device("cpu"), two_four)


def two_four(rows: int = 8, columns: int = 16) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns))


@dataclass
class Picky:
    """A kernel for wholly 2:4 layers that multiplies with the packed form."""

    def unsupported(self, spec: object) -> str | None:
        return None if getattr(spec, "two_four") else "a module of the layer is dense"  # noqa: B009

    def pack(self, layer: nn.Module, weight: object) -> None:
        packed = weight.packed()  # type: ignore[attr-defined]  # a LoadedWeight
        layer.register_parameter("weight_packed", nn.Parameter(packed.values, requires_grad=False))
        layer.register_buffer("positions", packed.indices)

    def matmul(self, layer: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
        from sparseserve.sparsity import Packed24

        packed = Packed24(layer.get_parameter("weight_packed"), layer.get_buffer("positions"))
        return nn.functional.linear(inputs, unpack24(packed), bias)


def test_the_first_kernel_that_can_is_chosen() -> None:
    from sparseserve.serving.kernels import KERNELS, choose_kernel

    kernels = {"picky": Picky, **KERNELS}
    assert choose_kernel(spec(), kernels).name == "picky"  # type: ignore[arg-type]


def test_a_kernel_passed_over_leaves_its_reason() -> None:
    from sparseserve.serving.kernels import KERNELS, choose_kernel

    choice = choose_kernel(spec(two_four=False), {"picky": Picky, **KERNELS})  # type: ignore[arg-type]
    assert choice.name == "dense"
    assert choice.reason == "picky: a module of the layer is dense"


def test_where_no_kernel_can_all_reasons_are_given() -> None:
    from sparseserve.serving.kernels import choose_kernel

    with pytest.raises(ServingError, match="picky: a module of the layer is dense"):
        choose_kernel(spec(two_four=False), {"picky": Picky})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["picky", "dense"])
def test_every_kernel_multiplies_with_the_weight_it_was_given(name: str) -> None:
    from sparseserve.serving.kernels import KERNELS, LoadedWeight, RowBlock

    weights, inputs, bias = [two_four(), two_four()], torch.randn(2, 3, 16), torch.randn(16)
    blocks = (RowBlock("a", pack24(weights[0])), RowBlock("b", weights[1]))
    kernel, layer = {"picky": Picky, **KERNELS}[name](), nn.Module()
    kernel.pack(layer, LoadedWeight(blocks))
    found = kernel.matmul(layer, inputs, bias)
    torch.testing.assert_close(found, inputs @ torch.cat(weights).T + bias)


def test_packing_dense_rows_that_are_not_two_four_names_the_module() -> None:
    from sparseserve.serving.kernels import LoadedWeight, RowBlock

    with pytest.raises(ServingError, match=r"a\.b\.weight: .*not 2:4"):
        LoadedWeight((RowBlock("a.b", torch.ones(4, 8)),)).packed()
