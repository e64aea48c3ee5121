"""Layers of codes and scales in vLLM: cut for each rank, merged, and multiplied with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import unpack24
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.quantized24 import quantized24, stored_parts
from sparseserve.errors import ServingError
from sparseserve.serving.kernels.cpu.library import missing_library
from tests.serving.parallel_ranks import (
    PARENT,
    Ranks,
    finish,
    packed_method_config,
    random_two_four,
)

pytest.importorskip("vllm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

needs_library = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


@pytest.fixture(params=["int8", "fp8", "int4"])
def how(request: pytest.FixtureRequest) -> Quantization:
    return Quantization(to=request.param)


def config_of(how: Quantization, *modules: str) -> Any:
    config = packed_method_config(*modules)
    config.quantization, config.read_dtype = how, torch.float32
    return config


def load(layer: Any, weight: Tensor, how: Quantization, *shard: Any) -> None:
    names = ("weight_values", "weight_indices", "weight_scale")
    parts = stored_parts(quantized24(weight, how), how).values()
    for name, tensor in zip(names, parts, strict=True):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *shard)


def dequantised(weight: Tensor, how: Quantization) -> Tensor:
    return unpack24(quantized24(weight, how).dequantized())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_share_the_outputs_make_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, how: Quantization, size: int
) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    gate, up = random_two_four(24, 192), random_two_four(24, 192, seed=1)
    parts: list[Tensor] = []
    for _ in Ranks(monkeypatch, size):
        layer = MergedColumnParallelLinear(
            192,
            [24, 24],
            bias=False,
            quant_config=config_of(how, "gate_proj", "up_proj"),
            prefix=f"{PARENT}.gate_up_proj",
        )
        load(layer, gate, how, 0)
        load(layer, up, how, 1)
        parts.append(finish(layer))
    share = 24 // size
    found_gate = torch.cat([part[:share] for part in parts])
    found_up = torch.cat([part[share:] for part in parts])
    torch.testing.assert_close(found_gate, dequantised(gate, how), rtol=1e-6, atol=0)
    torch.testing.assert_close(found_up, dequantised(up, how), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 3])
def test_ranks_that_share_the_inputs_make_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, how: Quantization, size: int
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    weight = random_two_four(16, 192)
    parts = []
    for _ in Ranks(monkeypatch, size):
        layer = RowParallelLinear(
            192, 16, quant_config=config_of(how, "down_proj"), prefix=f"{PARENT}.down_proj"
        )
        load(layer, weight, how)
        parts.append(finish(layer))
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, dequantised(weight, how), rtol=1e-6, atol=0)


def test_a_share_that_cuts_a_group_of_inputs_with_one_scale_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    how = Quantization(to="int4")
    for _ in Ranks(monkeypatch, 2):
        with pytest.raises(ServingError, match="96 of 192 input features cut a group of 64"):
            RowParallelLinear(
                192, 16, quant_config=config_of(how, "down_proj"), prefix=f"{PARENT}.down_proj"
            )


@pytest.mark.parametrize("part", ["weight_values", "weight_indices", "weight_scale"])
def test_a_part_that_was_not_loaded_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, how: Quantization, part: str
) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = RowParallelLinear(
            64, 8, quant_config=config_of(how, "down_proj"), prefix=f"{PARENT}.down_proj"
        )
        empty = getattr(layer, part).data.clone()
        load(layer, random_two_four(8, 64), how)
        getattr(layer, part).data.copy_(empty)
        name = part.replace("_values", "")
        with pytest.raises(ServingError, match=rf"down_proj\.{name} is missing"):
            finish(layer)


def one_layer(monkeypatch: pytest.MonkeyPatch, weight: Tensor, dtype: torch.dtype) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    for _ in Ranks(monkeypatch, 1):
        layer = RowParallelLinear(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            params_dtype=dtype,
            quant_config=config_of(Quantization(to="int8"), "down_proj"),
            prefix=f"{PARENT}.down_proj",
        )
        load(layer, weight.to(dtype), Quantization(to="int8"))
        layer.quant_method.process_weights_after_loading(layer)
    return layer


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_layers_round_their_inputs_token_by_token(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    weight = random_two_four(16, 64)
    layer = one_layer(monkeypatch, weight, dtype)
    tokens = torch.randn(5, 64).to(dtype)
    codes = quantized24(weight.to(dtype), Quantization(to="int8"))
    wide = unpack24(codes.codes).double() * codes.scale.double()
    # Half a step in float64 need not be half a step in float32.
    step = tokens.float().abs().amax(dim=1, keepdim=True) / 127
    numbers = (tokens.float() / step).round().double()
    expected = numbers * step.double() @ wide.T
    found = layer.quant_method.apply(layer, tokens, None)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=2 * rounding, atol=rounding)
    assert layer.quant_method.kernels.chosen == "cpu_int8"


def test_without_its_kernel_an_int8_layer_multiplies_what_the_codes_stand_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", "dense")
    weight = random_two_four(16, 64)
    layer = one_layer(monkeypatch, weight, torch.float32)
    tokens = torch.randn(5, 64)
    expected = tokens @ dequantised(weight, Quantization(to="int8")).T
    torch.testing.assert_close(layer.quant_method.apply(layer, tokens, None), expected)
