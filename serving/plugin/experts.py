"""How vLLM loads and runs the experts of a mixture whose weights are all 2:4, on a CPU.

vLLM loads the experts of a layer as two dense tensors. As soon as they are whole they are packed,
so that memory never holds more than a few layers of them dense. One layer of each shape is timed
both ways: where vLLM's own experts are faster, they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from sparseserve.errors import ServingError
from sparseserve.serving.kernels import DENSE, LayerKernels
from sparseserve.serving.kernels.choice.choose import allowed_kernels
from sparseserve.serving.kernels.cpu.experts import ExpertWeights, pack_experts
from sparseserve.serving.kernels.cpu.token_groups import RoutedTokens
from sparseserve.serving.plugin.expert_timing import ExpertTimes, frozen
from sparseserve.serving.plugin.parameters import NOT_LOADED

logger = init_logger("vllm.sparseserve")

# Tokens whose experts' outputs are added up at once, in float32.
_ADDED_TOKENS = 256
_ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.GELU,
    MoEActivation.GELU_TANH,
    MoEActivation.SWIGLUOAI,
)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """The experts of one layer: ``up`` holds the gates, too."""

    up: ExpertWeights
    down: ExpertWeights


class TwoFourExperts(CPUUnquantizedExperts):  # type: ignore[misc]  # vLLM is checked as Any
    """Runs experts that are packed; vLLM's kernel prepares the tokens and takes what comes out."""

    packed: PackedExperts
    swiglu: SwigluOAIAndMul | None

    def take(self, packed: PackedExperts, activation: MoEActivation) -> None:
        """Run the experts ``packed``."""
        self.packed = packed
        # vLLM has no operator for this one on a CPU.
        self.swiglu = SwigluOAIAndMul() if activation == MoEActivation.SWIGLUOAI else None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing: the weights are packed."""

    def moe_problem_size(
        self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor
    ) -> tuple[int, int, int, int, int]:
        """Return experts, tokens, outputs of the first linears, inputs and choices a token."""
        up = self.packed.up
        return up.experts, a1.shape[-2], up.rows, a1.shape[-1], topk_ids.shape[1]

    def apply(  # noqa: PLR0917  # vLLM's signature
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: object,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write what the chosen experts make of each token, weighted and added up."""
        packed = self.packed
        routed = RoutedTokens.of(topk_ids, packed.up.experts)
        inputs = hidden_states.index_select(0, routed.rows)
        hidden = self._activated(packed.up.matmul(inputs, routed.groups, self.w1_bias), activation)
        found = packed.down.matmul(hidden, routed.groups, self.w2_bias)
        weights = topk_weights.float()
        if apply_router_weight_on_input:
            weights = torch.ones_like(weights)
        for first in range(0, len(output), _ADDED_TOKENS):
            part = slice(first, first + _ADDED_TOKENS)
            chosen = found.index_select(0, routed.places[part].flatten()).float()
            chosen = chosen.view(-1, topk_ids.shape[1], found.shape[1])
            output[part] = torch.bmm(weights[part, None, :], chosen)[:, 0]

    def _activated(self, found: Tensor, activation: MoEActivation) -> Tensor:
        if self.swiglu is not None:
            made: Tensor = self.swiglu.forward_native(found)
            return made.contiguous()
        settings = ApplyMoEActivationConfig.from_configs(self.moe_config, self.quant_config)
        hidden = found.new_empty(len(found), found.shape[1] // 2)
        apply_moe_activation(activation, hidden, found, activation_config=settings)
        return hidden


class TwoFourExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]  # vLLM is checked as Any
    """Loads experts as vLLM does and packs them, where they are 2:4 and that is faster."""

    def __init__(self, moe: Any, times: ExpertTimes) -> None:
        super().__init__(moe)
        self._times = times
        # Shards as vLLM calls them: w1 the gate, w3 the linear beside it, w2 the last one.
        self._missing: set[tuple[str, int]] = set()
        self._loaded = False
        self.kernels: dict[str, LayerKernels] = {}
        self._packed: PackedExperts | None = None
        self._refusal = _refusal(moe)

    def create_weights(self, layer: Any, num_experts: int, *args: Any, **kwargs: Any) -> None:
        """Register dense weights; the last of them to be loaded has all of them packed."""
        shards = ("w1", "w2", "w3")
        self._missing = {(shard, expert) for shard in shards for expert in range(num_experts)}
        kwargs["weight_loader"] = self._watched(layer, kwargs["weight_loader"])
        super().create_weights(layer, num_experts, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the kernel of what was packed, or vLLM's own.

        Raises:
            ServingError: The weight of an expert was not loaded, though others were.
        """
        if self._loaded and self._missing:
            shard, expert = min(self._missing)
            raise ServingError(f"{layer.layer_name}: {shard} of expert {expert} {NOT_LOADED}")
        if self._packed is None and self._refusal is None:
            self._pack(layer)
        if self._packed is None:
            logger.info_once("experts run dense: %s", self._refusal)
            super().process_weights_after_loading(layer)
            return
        for linear, weights in (("w13", self._packed.up), ("w2", self._packed.down)):
            # vLLM hands the first of these to apply(), which does not need it.
            for part, ending in zip(weights.parts, ("weight", "weight_dense"), strict=False):
                layer.register_parameter(f"{linear}_{ending}", frozen(part.panels))
                kernels = part.kernels
                logger.info_once("%d experts: %s", len(part.experts), kernels.describe())
            self.kernels[linear] = weights.parts[0].kernels
        self.experts_cls = TwoFourExperts
        self._init_moe_kernel(layer)
        self.moe_kernel.fused_experts.take(self._packed, layer.activation)

    def _watched(self, layer: Any, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``load``, which packs the experts when it has loaded the last of them."""

        @wraps(load)
        def loader(  # vLLM's signature
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            is_weight = param is layer.w13_weight or param is layer.w2_weight
            if is_weight and self._packed is not None:
                raise ServingError(
                    f"{layer.layer_name}: packed experts cannot take other weights while the "
                    "server runs: start it again with the new checkpoint"
                )
            done = load(param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs)
            if not is_weight:
                return done  # a bias
            # Some models hand over the weights of all experts at once.
            experts = range(len(param)) if loaded_weight.ndim > param.ndim - 1 else (expert_id,)
            self._missing.difference_update((shard_id, expert) for expert in experts)
            self._loaded = True
            if not self._missing and self._packed is None and self._refusal is None:
                self._pack(layer)
            return done

        return loader

    def _pack(self, layer: Any) -> None:
        name = layer.layer_name
        up, down = layer.w13_weight, layer.w2_weight
        try:
            packed = PackedExperts(
                pack_experts(f"{name}.w13", up.data, logger.info, self._times.linears),
                pack_experts(f"{name}.w2", down.data, logger.info, self._times.linears),
            )
        except ServingError as error:
            self._refusal = str(error)
            return
        if DENSE in allowed_kernels() and not self._times.is_gain(
            layer, self._experts(self.experts_cls), self._two_four(layer, packed)
        ):
            self._refusal = "vLLM's own are faster on this machine"
            return
        self._packed = packed
        for dense in (up, down):  # the model may hold them until all is loaded
            dense.data = dense.data.new_empty(0)

    def _two_four(self, layer: Any, packed: PackedExperts) -> TwoFourExperts:
        made: TwoFourExperts = self._experts(TwoFourExperts)
        made.take(packed, layer.activation)
        return made

    def _experts(self, kind: Any) -> Any:
        return kind(moe_config=self.moe, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG)


def _refusal(moe: Any) -> str | None:
    """Return why experts of this kind are left to vLLM, or None."""
    if moe.moe_parallel_config.use_ep:
        return "with expert parallelism each rank holds experts of its own"
    if moe.activation not in _ACTIVATIONS:
        return f"their activation {moe.activation.value} is not known here"
    if moe.swiglu_limit is not None and moe.activation != MoEActivation.SWIGLUOAI:
        return f"their gates are limited to {moe.swiglu_limit}, for which vLLM has no operator here"
    return None
