"""Would training a whole decoder layer with an l1 penalty beat layer-wise FISTA at equal time?

The gradient method: Adam on all weights of the operators of a decoder layer, towards the dense
layer's outputs on the calibration windows, with an l1 penalty; then rounding to 2:4, then a refit
operator by operator or, for half of the time, masked training towards the same outputs. The time
allowed is what the layer-wise method with error correction takes, statistics included, in processor
time of one thread. Rate and penalty are the best of a grid on the first layer, judged on the
held-out windows, which favours the gradient::

    OMP_NUM_THREADS=1 python -m benchmarks.research.gradient_blocks
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor, nn

from benchmarks.harness.results import RESEARCH, write_result
from benchmarks.research.operator_data import (
    MODEL,
    LayerWindows,
    Windows,
    decoder_layers,
)
from sparseserve.models.hooks import hidden_output
from sparseserve.models.layers import (
    copy_layer,
    group_input,
    layer_weight,
    run_layer,
    set_layer_weight,
)
from sparseserve.models.structure import Operator
from sparseserve.pruners import PRUNERS
from sparseserve.solvers.conjugate_gradient import refit
from sparseserve.solvers.problem import operator_problem
from sparseserve.solvers.statistics import InputStatistics, StatisticsSum
from sparseserve.sparsity import TWO_FOUR

LAYERS = (4, 12)
WINDOWS = Windows()
RATES = (1e-3, 3e-3)
# Relative to a loss of 1 for a layer that adds nothing, and to the dense weights' own l1 norm.
PENALTIES = (0.1, 1.0)
MASKED_RATE = 3e-4
LAYER_WISE = ("wanda", "sparsegpt", "admm", "fista")

Weights = Mapping[str, Tensor]
Solve = Callable[[Operator, InputStatistics], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one decoder layer.

    The errors are ``||f_pruned(h) - f(h)|| / ||f(h) - h||``, ``f`` being the layer.
    """

    layer: int
    method: str
    seconds: float
    calibration_error: float
    heldout_error: float
    steps: int = 0
    rate: float = 0.0
    penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder layer, its dense outputs, and the scale of every operator's columns."""

    layer: LayerWindows
    targets: tuple[Tensor, ...]
    scales: dict[str, Tensor]

    @classmethod
    def of(cls, layer: LayerWindows) -> Block:
        targets = tuple(run_layer(layer.module, window, layer.call) for window in layer.seen)
        scales = {}
        for group in layer.structure.groups:
            energy = sum(
                group_input(layer.module, window, layer.call, group).square().sum(dim=0)
                for window in layer.seen
            )
            assert isinstance(energy, Tensor)
            scales.update({item.name: energy.sqrt() for item in group.operators})
        return cls(layer, targets, scales)

    def student(self, weights: Weights) -> nn.Module:
        """Return a copy of the layer with ``weights``, by name within the layer."""
        copy = copy_layer(self.layer.module)
        for operator in self.layer.structure.operators:
            if operator.name in weights:
                set_layer_weight(copy, operator, weights[operator.name])
        return copy

    def row(self, method: str, weights: Weights, seconds: float) -> Row:
        student = self.student(weights)
        errors = []
        for hidden in (self.layer.seen, self.layer.other):
            wrong = added = 0.0
            for window in hidden:
                dense = run_layer(self.layer.module, window, self.layer.call)
                found = run_layer(student, window, self.layer.call)
                wrong += float((found - dense).square().sum())
                added += float((dense - window).square().sum())
            errors.append((wrong / added) ** 0.5)
        return Row(
            layer=self.layer.number,
            method=method,
            seconds=seconds,
            calibration_error=errors[0],
            heldout_error=errors[1],
        )


def operator_by_operator(block: Block, start: Weights, solve: Solve) -> Weights:
    """Solve for every operator in the order of the data, with error correction.

    The inputs of a group are those of the layer with ``start`` and with what is solved before.
    """
    layer, found = block.layer, dict(start)
    for number, group in enumerate(layer.structure.groups):
        student = block.student(found)
        corrected = number > 0 or bool(start)
        total = StatisticsSum(group.in_features, corrected=corrected, device=torch.device("cpu"))
        for window in layer.seen:
            dense = group_input(layer.module, window, layer.call, group)
            if corrected:
                seen = group_input(student, window, layer.call, group)
                total.add(seen, dense)
            else:
                total.add(dense)
        statistics = total.finish()
        for operator in group.operators:
            found[operator.name] = solve(operator, statistics)
    return found


def layer_wise(block: Block, method: str) -> tuple[Weights, float]:
    """Prune operator by operator; return the weights and the time."""
    clock = time.process_time()
    pruner = PRUNERS[method]()

    def solve(operator: Operator, statistics: InputStatistics) -> Tensor:
        dense = layer_weight(block.layer.module, operator)
        return pruner.prune(dense, statistics, TWO_FOUR).weight

    return operator_by_operator(block, {}, solve), time.process_time() - clock


def train(
    block: Block, start: Weights, seconds: float, *, rate: float, penalty: float, masked: bool
) -> tuple[Weights, int]:
    """Run Adam for ``seconds`` of processor time with a linearly falling rate, one window a step.

    ``masked`` keeps the zeros of ``start``. Returns the weights and the steps made.
    """
    student = block.student(start)
    weights = {
        name: student.get_submodule(name).get_parameter("weight").requires_grad_(True)
        for name in block.scales
    }
    masks = {name: (weight != 0).detach() for name, weight in weights.items()}
    sizes = {
        item.name: _l1(block, item.name, layer_weight(block.layer.module, item))
        for item in block.layer.structure.operators
    }
    pairs = list(zip(block.layer.seen, block.targets, strict=True))
    energy = float(sum((target - hidden).square().sum() for hidden, target in pairs)) / len(pairs)
    optimizer = torch.optim.Adam(weights.values(), lr=rate, foreach=False)
    clock, steps = time.process_time(), 0
    while (spent := time.process_time() - clock) < seconds:
        optimizer.param_groups[0]["lr"] = rate * (1 - spent / seconds)
        hidden, target = pairs[steps % len(pairs)]
        output = hidden_output(block.layer.call.apply(student, hidden))
        assert output is not None
        loss = (output - target).square().sum() / energy
        if penalty:
            shares = [_l1(block, name, weight) / sizes[name] for name, weight in weights.items()]
            loss = loss + penalty * torch.stack(shares).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without a signature
        optimizer.step()
        if masked:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_(masks[name])
        steps += 1
    return {name: weight.detach().clone() for name, weight in weights.items()}, steps


def rounded(block: Block, weights: Weights) -> Weights:
    """Round to 2:4 by ``|w_ij| ||x_j||``, which is better than by ``|w_ij|``."""
    return {
        name: weight.where(TWO_FOUR.best_mask(weight.abs() * block.scales[name]), 0)
        for name, weight in weights.items()
    }


def refitted(block: Block, weights: Weights) -> Weights:
    """Fit every operator's values on its mask."""

    def solve(operator: Operator, statistics: InputStatistics) -> Tensor:
        problem = operator_problem(layer_weight(block.layer.module, operator), statistics, 0.01)
        start = weights[operator.name]
        return refit(problem, start != 0, start, iterations=40).weight

    return operator_by_operator(block, weights, solve)


def trained_with_l1(block: Block, seconds: float, rate: float, penalty: float) -> Iterator[Row]:
    """Yield the gradient method's rows for one time, rate and penalty."""
    whole, steps = train(block, {}, seconds, rate=rate, penalty=penalty, masked=False)

    def row(method: str, weights: Weights, spent: float, steps: int) -> Row:
        found = block.row(method, weights, spent)
        return replace(found, steps=steps, rate=rate, penalty=penalty)

    projected = rounded(block, whole)
    yield row("l1 training, rounded", projected, seconds, steps)
    clock = time.process_time()
    better = refitted(block, projected)
    spent = seconds + time.process_time() - clock
    yield row("l1 training, rounded, refit", better, spent, steps)
    half, first = train(block, {}, seconds / 2, rate=rate, penalty=penalty, masked=False)
    tuned, second = train(
        block, rounded(block, half), seconds / 2, rate=MASKED_RATE, penalty=0, masked=True
    )
    yield row("l1 training, rounded, masked training", tuned, seconds, first + second)


def compare(block: Block, grid: list[tuple[float, float]], say: Callable[[Row], None]) -> list[Row]:
    """Return the rows of one layer, and call ``say`` with each as it is done."""
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        say(row)

    solved = {method: layer_wise(block, method) for method in LAYER_WISE}
    for method, (weights, seconds) in solved.items():
        add(block.row(method, weights, seconds))
    allowed = max(seconds for _, seconds in solved.values())
    for method in ("sparsegpt", "admm"):
        weights, seconds = solved[method]
        left = max(allowed - seconds, allowed / 10)
        better, steps = train(block, weights, left, rate=MASKED_RATE, penalty=0, masked=True)
        row = block.row(f"{method}, masked training", better, seconds + left)
        add(replace(row, steps=steps, rate=MASKED_RATE))
    for rate, penalty in grid:
        for row in trained_with_l1(block, allowed, rate, penalty):
            add(row)
    return rows


def _l1(block: Block, name: str, weight: Tensor) -> Tensor:
    return (weight.abs() * block.scales[name]).sum()


@click.command()
@click.option("--model", default=MODEL, show_default=True)
@click.option("--layer", "numbers", multiple=True, type=int, default=LAYERS, show_default=True)
@click.option("--smoke", is_flag=True, help="Two short windows of MODEL's first layer.")
def main(model: str, numbers: tuple[int, ...], smoke: bool) -> None:
    windows = Windows(samples=1, heldout=1, length=16) if smoke else WINDOWS
    grid = list(
        itertools.product(RATES[:1], PENALTIES[:1])
        if smoke
        else itertools.product(RATES, PENALTIES)
    )
    rows: list[Row] = []
    for layer in decoder_layers(model, (0,) if smoke else numbers, windows):
        found = compare(Block.of(layer), grid, lambda row: click.echo(row, err=True))
        rows += found
        tuned = min((row for row in found if row.penalty), key=lambda row: row.heldout_error)
        grid = [(tuned.rate, tuned.penalty)]
        if not smoke:
            tokens = WINDOWS.samples * WINDOWS.length
            write_result(
                RESEARCH / "gradient-blocks.json", {"model": model, "tokens": tokens}, rows=rows
            )


if __name__ == "__main__":
    main()
