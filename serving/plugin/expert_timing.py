"""Whether experts run faster packed than as vLLM runs them dense, measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from sparseserve.serving.kernels.choice.choose import TimedLayers

logger = init_logger("vllm.sparseserve")

_TOKENS = (1, 8, 64, 256)
_REPEATS = 5
_FLUSHED_VALUES = 8 * 2**20


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
    weights = (
        (dense, own.get_parameter("w13_weight"), own.get_parameter("w2_weight")),
        (packed, layer.w13_weight, layer.w2_weight),
    )
    logs = []
    for tokens in _TOKENS:
        # While a model is loaded, the default dtype is its own; vLLM's shares are float32.
        inputs = torch.randn(tokens, layer.hidden_size, dtype=layer.w13_weight.dtype)
        scores = torch.rand(tokens, len(layer.w13_weight), dtype=torch.float32)
        shares, chosen = scores.topk(layer.top_k)
        runs = [
            partial(
                run_experts,
                experts,
                inputs,
                shares,
                chosen.int(),
                layer.activation,
                up=up,
                down=down,
            )
            for experts, up, down in weights
        ]
        dense_seconds, packed_seconds = _medians(runs)
        logs.append(math.log(dense_seconds / packed_seconds))
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
        apply_router_weight_on_input=False,
    )
    return output


def _medians(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Return the median seconds of each, taken in turns, its weights in memory."""
    taken: list[list[float]] = [[] for _ in runs]
    flush = torch.zeros(_FLUSHED_VALUES)
    for run in runs:
        run()
    for _ in range(_REPEATS):
        for run, seconds in zip(runs, taken, strict=True):
            flush.sum()
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def frozen(tensor: Tensor) -> Parameter:
    """Return ``tensor`` as a parameter that is not trained."""
    return Parameter(tensor, requires_grad=False)
