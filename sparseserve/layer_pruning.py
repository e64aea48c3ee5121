"""Pruning one decoder layer, operator by operator."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sparseserve.errors import NumericalError, SparseServeError
from sparseserve.layer_statistics import LayerStatistics, relative_output_error
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import (
    copy_layer,
    group_input,
    layer_inputs,
    layer_weight,
    set_layer_weight,
)
from sparseserve.models.structure import LayerStructure, Operator, OperatorGroup
from sparseserve.recipe import PruneRecipe
from sparseserve.report import LayerReport, OperatorReport


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """The new weights of one decoder layer ``{full module name: [out, in]}`` and its report."""

    weights: dict[str, Tensor]
    report: LayerReport


class PruneProgress(Protocol):
    """What a user interface wants to hear of a run."""

    def layer_started(self, name: str, number: int, total: int) -> None:
        """A decoder layer is about to be pruned; ``number`` counts from 1."""
        ...

    def operator_pruned(self, report: OperatorReport) -> None:
        """An operator is done."""
        ...

    def layer_finished(self, report: LayerReport) -> None:
        """A decoder layer is done, or was found on disk."""
        ...


@dataclass(frozen=True, slots=True)
class Silence:
    """A progress that shows nothing."""

    def layer_started(self, name: str, number: int, total: int) -> None:
        """Say nothing."""

    def operator_pruned(self, report: OperatorReport) -> None:
        """Say nothing."""

    def layer_finished(self, report: LayerReport) -> None:
        """Say nothing."""


def planned_operators(layer: LayerStructure, recipe: PruneRecipe) -> list[Operator]:
    """Return the operators of a layer that the recipe prunes."""
    return [
        operator
        for group in layer.groups
        for operator in group.operators
        if not recipe.ignores(f"{layer.name}.{operator.name}")
    ]


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A decoder layer about to be pruned.

    Attributes:
        layer: Its structure.
        dense: A dense copy on ``device`` in ``dtype``.
        call: Its other arguments, likewise.
        hidden: What enters it, ``[1, tokens, hidden]`` a window, kept on the CPU.
        device: Where it runs.
        dtype: What it computes in.
        storage_dtype: What its weights are stored in.
    """

    layer: LayerStructure
    dense: nn.Module
    call: LayerCall
    hidden: Sequence[Tensor]
    device: torch.device
    dtype: torch.dtype
    storage_dtype: torch.dtype

    @classmethod
    def start(
        cls,
        module: nn.Module,
        layer: LayerStructure,
        call: LayerCall,
        hidden: Sequence[Tensor],
        device: torch.device,
    ) -> LayerRun:
        """Copy ``module`` to ``device``."""
        storage = next(module.parameters()).dtype
        # The 16-bit arithmetic of CPUs is slow where it is exact and inexact where it is not.
        dtype = torch.float32 if device.type == "cpu" else storage
        dense = copy_layer(module, device, dtype)
        return cls(layer, dense, call.to(device, dtype), hidden, device, dtype, storage)

    def windows(self) -> Iterator[Tensor]:
        """Yield the hidden states of one window at a time on the device; they wait on the CPU."""
        for window in self.hidden:
            yield window.to(self.device, self.dtype)


def prune_layer(run: LayerRun, recipe: PruneRecipe, progress: PruneProgress) -> PrunedLayer:
    """Prune every planned operator of the layer, in the order in which data reaches them.

    Raises:
        NumericalError: Names the operator.
    """
    started = time.perf_counter()
    planned = {operator.name for operator in planned_operators(run.layer, recipe)}
    groups = [
        group
        for group in run.layer.groups
        if any(operator.name in planned for operator in group.operators)
    ]
    corrected = recipe.error_correction == "intra"
    shared = [] if corrected else _dense_statistics(run, groups)
    pruned = copy_layer(run.dense)
    weights: dict[str, Tensor] = {}
    reports = []
    for number, group in enumerate(groups):
        if corrected:
            statistics = _corrected_statistics(run, pruned, group, first=not weights)
        else:
            statistics = shared[number]
        for operator in group.operators:
            if operator.name not in planned:
                continue
            weight, report = _prune_operator(run, operator, statistics, recipe)
            set_layer_weight(pruned, operator, weight)
            weights[report.name] = weight.cpu()
            reports.append(report)
            progress.operator_pruned(report)
    seconds = time.perf_counter() - started
    return PrunedLayer(weights, LayerReport(run.layer.name, tuple(reports), seconds))


def _dense_statistics(run: LayerRun, groups: Sequence[OperatorGroup]) -> list[LayerStatistics]:
    """Sum the second moments of every group's dense inputs in one pass over the windows."""
    collected = [
        LayerStatistics.empty(group.operators[0].in_features, corrected=False, device=run.device)
        for group in groups
    ]
    for window in run.windows():
        inputs, _ = layer_inputs(run.dense, window, run.call, groups)
        collected = [part.updated(x) for part, x in zip(collected, inputs, strict=True)]
    return collected


def _corrected_statistics(
    run: LayerRun, pruned: nn.Module, group: OperatorGroup, *, first: bool
) -> LayerStatistics:
    """Sum the second moments of a group's dense and pruned inputs, token by token.

    For the ``first`` group of a layer the two inputs are equal and one is enough.
    """
    statistics = LayerStatistics.empty(
        group.operators[0].in_features, corrected=not first, device=run.device
    )
    for window in run.windows():
        dense_inputs = group_input(run.dense, window, run.call, group)
        if first:
            statistics = statistics.updated(dense_inputs)
        else:
            pruned_inputs = group_input(pruned, window, run.call, group)
            statistics = statistics.updated(pruned_inputs, dense_inputs)
    return statistics


def _prune_operator(
    run: LayerRun, operator: Operator, statistics: LayerStatistics, recipe: PruneRecipe
) -> tuple[Tensor, OperatorReport]:
    started = time.perf_counter()
    name = f"{run.layer.name}.{operator.name}"
    dense_weight = layer_weight(run.dense, operator)
    try:
        result = recipe.pruner.prune(dense_weight, statistics, recipe.pattern)
    except SparseServeError as error:
        raise type(error)(f"{name}: {error}") from error
    # Adding zero turns the -0.0 that a kept weight may have become into 0.0.
    weight = result.weight.to(run.storage_dtype) + 0.0
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(
            f"{name}: the pruned weight is not finite in {weight.dtype}: "
            "choose --dtype bfloat16 or float32"
        )
    if violation := recipe.pattern.first_violation(weight):
        raise AssertionError(f"{name}: pruner broke pattern {recipe.pattern} at {violation}")
    report = OperatorReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        sparsity=float((weight == 0).float().mean()),
        relative_error=relative_output_error(weight, dense_weight, statistics),
        gram_products=result.gram_products,
        seconds=time.perf_counter() - started,
        transposed=operator.transposed,
    )
    return weight, report
