"""Tensors on their way into vLLM's model: renamed for our layers, unpacked for all others."""

from __future__ import annotations

import pytest
import torch

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.errors import ServingError
from sparseserve.sparsity import TWO_FOUR

pytest.importorskip("vllm")

Tensors = list[tuple[str, torch.Tensor]]
WEIGHT = TWO_FOUR.project(torch.arange(1.0, 33).view(4, 8))


def stored(module: str, values: str = "weight") -> Tensors:
    packed = pack24(WEIGHT)
    return [(f"{module}.{values}", packed.values), (f"{module}.weight_indices", packed.indices)]


def through(
    tensors: Tensors, taken: tuple[str, ...] = (), transposed: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    from sparseserve.serving.plugin.incoming import incoming

    packed = ("a.up", "a.down")
    return dict(incoming(tensors, packed, frozenset(taken), frozenset(transposed)))


@pytest.mark.parametrize("values", ["weight", "weight_values"])
def test_a_layer_of_ours_gets_its_parts_under_its_own_names(values: str) -> None:
    found = through(stored("a.up", values), taken=("a.up",))
    assert found.keys() == {"a.up.weight_values", "a.up.weight_indices"}


@pytest.mark.parametrize("values", ["weight", "weight_values"])
def test_what_no_layer_of_ours_runs_is_unpacked(values: str) -> None:
    assert through(stored("a.up", values))["a.up.weight"].equal(WEIGHT)
    turned = through(stored("a.up", values), transposed=("a.up",))
    assert turned["a.up.weight"].equal(WEIGHT.T)


def test_the_order_of_parts_does_not_matter_and_other_tensors_pass() -> None:
    bias, norm = torch.ones(4), torch.ones(8)
    up, down = stored("a.up"), stored("a.down")
    mixed = [up[1], ("a.up.bias", bias), down[0], ("norm.weight", norm), up[0], down[1]]
    found = through(mixed)
    assert found.keys() == {"a.up.bias", "norm.weight", "a.up.weight", "a.down.weight"}
    assert found["a.up.weight"].equal(WEIGHT)
    assert found["norm.weight"] is norm


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_without_the_other_is_refused_by_the_name_of_its_module(part: int) -> None:
    with pytest.raises(ServingError, match=r"a\.up has weight_(values|indices), but not what"):
        through([stored("a.up")[part]])


def test_damage_is_refused_by_the_name_of_the_module() -> None:
    (values, tensor), (indices, _) = stored("a.up")
    with pytest.raises(ServingError, match=r"a\.up: indices at row 0, group 0 do not ascend"):
        through([(values, tensor), (indices, torch.zeros(4, 1, dtype=torch.uint8))])


def test_watching_twice_wraps_vllms_loader_once() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from sparseserve.serving.plugin.incoming import watch_models

    watch_models()
    first = BaseModelLoader.create_model
    watch_models()
    assert BaseModelLoader.create_model is first
