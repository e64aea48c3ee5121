"""How fast do a mixture's experts run 2:4 on a processor, against vLLM's own?

The experts of one layer as they are served: vLLM's kernel for dense experts, and ours for packed
ones, on the same random tokens and random choices of a router, in bfloat16. They take turns; each
run has choices of its own, so that with a few tokens its experts lie in memory and not in a cache.
Every shape is timed in a fresh process; medians::

    OMP_NUM_THREADS=1 python -m benchmarks.serving.cpu_experts
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from types import SimpleNamespace

import click
import torch
from torch import Tensor

from benchmarks.harness.results import RESULTS, write_result
from sparseserve.sparsity import TWO_FOUR

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REPEATS = 9
MANY_TOKENS, FEW_REPEATS = 64, 3
_FLUSHED_VALUES = 24 * 2**20
# Of activations that none of these experts has.
UNUSED_SETTINGS = (
    "swiglu_limit",
    "swiglu_alpha",
    "swiglu_beta",
    "activation_situ_beta",
    "activation_situ_linear_beta",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """The experts of one layer; ``like`` is a model that has such."""

    like: str
    experts: int
    hidden: int
    width: int
    choices: int


SHAPES = (
    Shape("OLMoE-1B-7B", 64, 2048, 1024, 8),
    Shape("DeepSeek-V2-Lite", 64, 2048, 1408, 6),
    Shape("Qwen3-30B-A3B", 128, 2048, 768, 8),
    Shape("gpt-oss-20b", 32, 2880, 2880, 4),
    Shape("Mixtral-8x7B", 8, 4096, 14336, 2),
)
TINY = Shape("tiny", 4, 64, 96, 2)


@dataclass(frozen=True, slots=True)
class Row:
    """One shape and number of tokens: median milliseconds, and how far the two results differ.

    ``difference`` is the norm of the difference over that of vLLM's result.
    """

    shape: Shape
    tokens: int
    milliseconds: dict[str, float]
    difference: float


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def both(shape: Shape) -> dict[str, Experts]:
    """Return vLLM's experts and ours, of the same random weights, each with its own copy."""
    from torch import nn
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts,
        X86CPUUnquantizedExperts,
    )
    from vllm.platforms import current_platform

    from sparseserve.serving.kernels.cpu.experts import pack_experts
    from sparseserve.serving.plugin.expert_timing import frozen, run_experts
    from sparseserve.serving.plugin.experts import PackedExperts, TwoFourExperts

    current_platform.import_kernels()
    up = random_weights(shape.experts, 2 * shape.width, shape.hidden)
    down = random_weights(shape.experts, shape.hidden, shape.width)
    config = SimpleNamespace(
        **dict.fromkeys(UNUSED_SETTINGS),
        intermediate_size_per_partition=shape.width,
        activation=MoEActivation.SILU,
    )
    matrix_unit = X86CPUUnquantizedExperts._supports_current_device()
    kind = X86CPUUnquantizedExperts if matrix_unit else CPUUnquantizedExperts
    dense = kind(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    layer = nn.Module()
    layer.register_parameter("w13_weight", frozen(up))
    layer.register_parameter("w2_weight", frozen(down))
    dense.process_weights_after_loading(layer)
    packed = PackedExperts(*(pack_experts("experts", w, lambda _: None) for w in (up, down)))
    ours = TwoFourExperts(config, FUSED_MOE_UNQUANTIZED_CONFIG)
    ours.take(packed, MoEActivation.SILU)

    def experts(kind: object, up: Tensor, down: Tensor) -> Experts:
        return partial(run_experts, kind, activation=MoEActivation.SILU, up=up, down=down)

    return {
        "vllm": experts(dense, layer.get_parameter("w13_weight"), layer.get_parameter("w2_weight")),
        "packed": experts(ours, up, down),  # which it does not read
    }


def random_weights(experts: int, rows: int, columns: int) -> Tensor:
    """Return weights that differ in the order of their rows: others would take minutes to make."""
    first = TWO_FOUR.project(torch.randn(rows, columns) / columns**0.5).bfloat16()
    return torch.stack([first.roll(7 * number, 0) for number in range(experts)])


@torch.inference_mode()
def measure_shape(shape: Shape, counts: tuple[int, ...]) -> list[Row]:
    """Time one shape in this process."""
    torch.manual_seed(0)
    turns = both(shape)
    return [measure(shape, tokens, turns) for tokens in counts]


def measure(shape: Shape, tokens: int, turns: dict[str, Experts]) -> Row:
    taken: dict[str, list[float]] = {name: [] for name in turns}
    flush = torch.zeros(_FLUSHED_VALUES)
    difference = 0.0
    for repeat in range(1 + (REPEATS if tokens <= MANY_TOKENS else FEW_REPEATS)):
        inputs = torch.randn(tokens, shape.hidden).bfloat16()
        shares, chosen = torch.rand(tokens, shape.experts).softmax(-1).topk(shape.choices)
        found = {}
        for name, run in turns.items():
            flush.sum()
            started = time.perf_counter()
            found[name] = run(inputs, shares, chosen.int()).float()
            seconds = time.perf_counter() - started
            taken[name] += [seconds * 1000] if repeat else []  # the first only warms up
        gap = found["packed"] - found["vllm"]
        difference = max(difference, float(gap.norm() / found["vllm"].norm()))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return Row(shape, tokens, medians, difference)


@click.command()
@click.option("--result", default="cpu-experts.json", show_default=True)
@click.option("--smoke", is_flag=True, help="One tiny shape, nothing written: does it run?")
def main(result: str, smoke: bool) -> None:
    if smoke:
        for row in measure_shape(TINY, (1, 32)):
            click.echo(json.dumps(asdict(row)))
        return
    rows: list[Row] = []
    for shape in SHAPES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows += fresh.submit(measure_shape, shape, TOKENS).result()
        write_result(RESULTS / result, {"repeats": REPEATS}, rows=rows)
        click.echo(shape.like, err=True)


if __name__ == "__main__":
    main()
