"""Whether experts run faster packed than as vLLM runs them dense, measured on this machine."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from sparseserve.serving.kernels.choice.choose import TimedLayers
from sparseserve.serving.kernels.choice.timing import flushing, medians_in_turns

logger = init_logger("vllm.sparseserve")

_TOKENS = (1, 8, 64, 256)


class ExpertTimes:
    """Which shapes of experts run faster packed, as this engine has measured.

    Attributes:
        linears: Layers whose kernels it has timed.
    """

    def __init__(self) -> None:
        self.linears = TimedLayers()
        self._gains: dict[str, bool] = {}

    def is_gain(self, layer: Any, dense: Any, packed: Any) -> bool:
        """Time a layer's experts both ways, unless one of its shape was timed already.

        Args:
            layer: vLLM's layer with its dense weights.
            dense: vLLM's experts.
            packed: Ours, with what they have packed.
        """
        up, down = layer.w13_weight, layer.w2_weight
        shape = f"{tuple(up.shape)} {tuple(down.shape)} {up.dtype} {layer.top_k}"
        if shape not in self._gains:
            logger.info("timing %d experts of %d x %d", *up.shape)
            self._gains[shape] = _gain(layer, dense, packed) > 1
        return self._gains[shape]


def _gain(layer: Any, dense: Any, packed: Any) -> float:
    """Return dense time over packed time, the mean of some numbers of tokens."""
    own = nn.Module()
    for name in ("w13_weight", "w2_weight"):
        own.register_parameter(name, frozen(getattr(layer, name).data))
    dense.process_weights_after_loading(own)
    weights = {
        "dense": (dense, own.get_parameter("w13_weight"), own.get_parameter("w2_weight")),
        "packed": (packed, layer.w13_weight, layer.w2_weight),
    }
    flush = flushing(layer.w13_weight.device)
    logs = []
    for tokens in _TOKENS:
        # While a model is loaded, the default dtype is its own; vLLM's shares are float32.
        inputs = torch.randn(tokens, layer.hidden_size, dtype=layer.w13_weight.dtype)
        scores = torch.rand(tokens, len(layer.w13_weight), dtype=torch.float32)
        shares, chosen = scores.topk(layer.top_k)
        routed = (inputs, shares, chosen.int(), layer.activation)
        runs = {
            name: partial(run_experts, experts, *routed, up=up, down=down)
            for name, (experts, up, down) in weights.items()
        }
        seconds = medians_in_turns(runs, (flush, inputs))
        logs.append(math.log(seconds["dense"] / seconds["packed"]))
    return math.exp(statistics.fmean(logs))


def run_experts(
    experts: Any,
    inputs: Tensor,
    shares: Tensor,
    chosen: Tensor,
    activation: MoEActivation,
    *,
    up: Tensor,
    down: Tensor,
    weighed_before: bool = False,
) -> Tensor:
    """Run vLLM's experts or ours on all tokens, as vLLM's kernel does.

    Args:
        experts: Either.
        inputs: ``[tokens, hidden]``.
        shares: What each choice counts, float32 ``[tokens, choices]``.
        chosen: Numbers of experts, int32 ``[tokens, choices]``.
        activation: Between the linears.
        up: The first weight as vLLM keeps it for ``experts``.
        down: The second.
        weighed_before: Whether ``inputs`` were weighed already, so that the outputs must not be.

    Returns:
        ``[tokens, hidden]``.
    """
    output = torch.empty_like(inputs)
    none = inputs.new_empty(0)
    experts.apply(
        output=output,
        hidden_states=inputs,
        w1=up,
        w2=down,
        topk_weights=shares,
        topk_ids=chosen,
        activation=activation,
        global_num_experts=len(up),
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=none,
        workspace2=none,
        expert_tokens_meta=None,
        apply_router_weight_on_input=weighed_before,
    )
    return output


def frozen(tensor: Tensor) -> Parameter:
    """Return ``tensor`` as a parameter that is not trained."""
    return Parameter(tensor, requires_grad=False)
