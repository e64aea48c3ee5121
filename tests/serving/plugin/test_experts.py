"""Experts as vLLM hands them over, against one expert after the other in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.cpu.experts import pack_experts
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.sparsity import TWO_FOUR

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(missing_library() is not None, reason=str(missing_library())),
]

EXPERTS, HIDDEN, WIDTH, CHOICES = 6, 64, 96, 2
NO_LIMITS: dict[str, None] = dict.fromkeys(
    (
        "swiglu_limit",
        "swiglu_alpha",
        "swiglu_beta",
        "activation_situ_beta",
        "activation_situ_linear_beta",
    )
)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Take back what a configuration of vLLM sets for its child processes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def two_four(rows: int, columns: int) -> Tensor:
    weights = TWO_FOUR.project(torch.randn(EXPERTS * rows, columns) / columns**0.5)
    return weights.view(EXPERTS, rows, columns)


class Case:
    """Random experts, tokens and choices of a router."""

    def __init__(self, activation: Any, tokens: int, *, biased: bool = False) -> None:
        torch.manual_seed(tokens)
        self.activation = activation
        self.up, self.down = two_four(2 * WIDTH, HIDDEN), two_four(HIDDEN, WIDTH)
        self.biases = (torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN))
        self.biased = biased
        self.tokens = torch.randn(tokens, HIDDEN)
        self.shares, self.chosen = torch.rand(tokens, EXPERTS).topk(CHOICES)

    def found(self, *, weighed_before: bool = False) -> Tensor:
        """Return what our experts make of the tokens."""
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe.config import (
            FUSED_MOE_UNQUANTIZED_CONFIG,
            biased_moe_quant_config,
        )

        from sparseserve.serving.plugin.expert_timing import run_experts
        from sparseserve.serving.plugin.experts import PackedExperts, TwoFourExperts

        settings = (
            biased_moe_quant_config(*self.biases) if self.biased else FUSED_MOE_UNQUANTIZED_CONFIG
        )
        experts = TwoFourExperts(SimpleNamespace(**NO_LIMITS), settings)
        packed = PackedExperts(
            pack_experts("up", self.up, lambda _: None),
            pack_experts("down", self.down, lambda _: None),
        )
        with set_current_vllm_config(VllmConfig()):  # as while a model is loaded
            experts.take(packed, self.activation)
        return run_experts(
            experts,
            self.tokens,
            self.shares,
            self.chosen.int(),
            self.activation,
            up=self.up,
            down=self.down,
            weighed_before=weighed_before,
        )

    def expected(self, *, weighed_before: bool = False) -> Tensor:
        """Return it by the formula."""
        rows = []
        for token, shares, chosen in zip(self.tokens, self.shares, self.chosen, strict=True):
            row = torch.zeros(HIDDEN, dtype=torch.float64)
            for share, expert in zip(shares.double(), chosen, strict=True):
                up = self.up[expert].double() @ token.double()
                up += self.biases[0][expert] if self.biased else 0
                down = self.down[expert].double() @ self._activated(up)
                down += self.biases[1][expert] if self.biased else 0
                row += down if weighed_before else share * down
            rows.append(row)
        return torch.stack(rows)

    def _activated(self, up: Tensor) -> Tensor:
        gate, linear = up[:WIDTH], up[WIDTH:]
        if self.activation.value == "silu":
            return gate * gate.sigmoid() * linear
        if self.activation.value == "swigluoai":  # gpt-oss: side by side, clamped
            gate, linear = up[::2].clamp(max=7), up[1::2].clamp(-7, 7)
            return gate * (1.702 * gate).sigmoid() * (linear + 1)
        approximate = "tanh" if self.activation.value == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(gate, approximate=approximate) * linear


@pytest.mark.usefixtures("kernels_without_timing")
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("tokens", [1, 7, 600])
@pytest.mark.parametrize("biased", [False, True])
def test_each_token_gets_the_weighted_sum_of_its_experts(
    *, name: str, tokens: int, biased: bool
) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    case = Case(MoEActivation.from_str(name), tokens, biased=biased)
    torch.testing.assert_close(case.found().double(), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_without_timing")
def test_outputs_are_not_weighed_where_the_inputs_were() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    case = Case(MoEActivation.SILU, 5)
    found, expected = case.found(weighed_before=True), case.expected(weighed_before=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    """What vLLM's layer of experts offers while it is loaded, and its loader in short."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.layer_name, self.activation, self.top_k = "mlp.experts", activation, CHOICES
        self.hidden_size = HIDDEN

    def load(  # noqa: PLR0917  # vLLM's signature
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool:
        rows = slice(WIDTH, None) if shard_id == "w3" else slice(0, WIDTH)
        place = param.data if loaded_weight.ndim == param.ndim else param.data[expert_id]
        if shard_id != "w2":
            place = place[..., rows, :] if "weight" in weight_name else place[..., rows]
        place.copy_(loaded_weight)
        return return_success


def new_layer(*, has_bias: bool = False) -> tuple[Any, Any]:
    """Return a layer with nothing loaded, and the method that we give it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    from sparseserve.serving.plugin.expert_timing import ExpertTimes
    from sparseserve.serving.plugin.experts import TwoFourExpertsMethod

    layer: Any = Layer(MoEActivation.SILU)
    with set_current_vllm_config(VllmConfig()):
        config = FusedMoEConfig(
            num_experts=EXPERTS,
            experts_per_token=CHOICES,
            hidden_dim=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=EXPERTS,
            num_logical_experts=EXPERTS,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=RoutingMethodType.Default,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.float32,
            has_bias=has_bias,
        )
        method = TwoFourExpertsMethod(config, ExpertTimes())
        method.create_weights(
            layer, EXPERTS, HIDDEN, WIDTH, torch.float32, weight_loader=layer.load
        )
    return layer, method


@pytest.mark.usefixtures("kernels_without_timing")
def test_dense_experts_are_freed_when_the_last_of_them_was_loaded_and_not_before() -> None:
    layer, method = new_layer(has_bias=True)
    up, down = layer.w13_weight, layer.w2_weight
    gates, linears = two_four(WIDTH, HIDDEN), two_four(WIDTH, HIDDEN)
    weights = {"w1": gates, "w3": linears, "w2": two_four(HIDDEN, WIDTH)}
    for expert in range(EXPERTS):
        for param, bias, shard in (
            (up, layer.w13_bias, "w1"),
            (up, layer.w13_bias, "w3"),
            (down, layer.w2_bias, "w2"),
        ):
            weight = weights[shard][expert]
            # A bias of an expert says nothing of its weight.
            bias.weight_loader(bias, torch.ones(len(weight)), "bias", shard, expert)
            assert up.numel()
            assert down.numel()
            param.weight_loader(
                param=param,
                loaded_weight=weight,
                weight_name="weight",
                shard_id=shard,
                expert_id=expert,
                return_success=True,
            )
    assert not up.numel()
    assert not down.numel()
    assert method._packed.up.experts == EXPERTS


@pytest.mark.usefixtures("kernels_without_timing")
def test_experts_may_be_loaded_all_at_once() -> None:
    layer, method = new_layer()
    up, down = layer.w13_weight, layer.w2_weight
    load_ups(up)
    assert up.numel()
    load_downs(down)
    assert not up.numel()
    assert method._packed.down.rows == HIDDEN


def load_ups(up: Any) -> None:
    """Load the gates and the linears beside them, of all experts at once."""
    for shard in ("w1", "w3"):
        up.weight_loader(up, two_four(WIDTH, HIDDEN), "weight", shard, 0)


def load_downs(down: Any) -> None:
    """Load the last linears of all experts at once."""
    down.weight_loader(down, two_four(HIDDEN, WIDTH), "weight", "w2", 0)


@pytest.mark.usefixtures("kernels_without_timing")
def test_packed_experts_refuse_other_weights_while_they_serve() -> None:
    layer, method = new_layer()
    up = layer.w13_weight
    load_ups(up)
    load_downs(layer.w2_weight)
    before = method._packed
    with pytest.raises(ServingError, match="cannot take other weights while the server runs"):
        load_ups(up)
    assert method._packed is before


def test_gates_with_a_limit_are_left_to_vllm() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from sparseserve.serving.plugin.experts import _refusal

    config = SimpleNamespace(
        moe_parallel_config=SimpleNamespace(use_ep=False),
        activation=MoEActivation.SILU,
        swiglu_limit=7.0,
    )
    assert str(_refusal(config)).startswith("their gates are limited to 7.0")
    config.swiglu_limit = None
    assert _refusal(config) is None
    config.moe_parallel_config.use_ep = True
    assert str(_refusal(config)).startswith("with expert parallelism")


@pytest.mark.usefixtures("kernels_without_timing")
def test_experts_of_one_shape_are_timed_both_ways_once_in_the_dtype_of_their_model() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.platforms import current_platform

    from sparseserve.serving.plugin.expert_timing import ExpertTimes
    from sparseserve.serving.plugin.experts import PackedExperts, TwoFourExperts

    current_platform.import_kernels()
    up, down = (two_four(*shape).bfloat16() for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    layer = SimpleNamespace(
        w13_weight=up, w2_weight=down, hidden_size=HIDDEN, top_k=2, activation=MoEActivation.SILU
    )
    config = SimpleNamespace(
        **NO_LIMITS, intermediate_size_per_partition=WIDTH, activation=MoEActivation.SILU
    )
    dense = CPUUnquantizedExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    ours = TwoFourExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    packed = [pack_experts("experts", weights, lambda _: None) for weights in (up, down)]
    ours.take(PackedExperts(*packed), MoEActivation.SILU)
    times, usual = ExpertTimes(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as while vLLM loads such a model
    try:
        first = times.is_gain(layer, dense, ours)
    finally:
        torch.set_default_dtype(usual)
    assert times.is_gain(layer, None, None) is first
