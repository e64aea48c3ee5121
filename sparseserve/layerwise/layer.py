"""Pruning one decoder layer: its operators group by group, then the layer as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sparseserve.errors import NumericalError, SparseServeError
from sparseserve.huggingface.experts import experts_in
from sparseserve.layerwise.group_statistics import GroupStatistics
from sparseserve.layerwise.head_rotation import rotated_heads
from sparseserve.layerwise.plan import planned_operators
from sparseserve.layerwise.preparation import Preparation
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.reconstruction import OutputError, reconstruct
from sparseserve.layerwise.smoothing import smoothed
from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.layers import copy_layer, layer_weight, set_layer_weight
from sparseserve.models.structure import Operator
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import LayerReport, OperatorReport, ReconstructionReport
from sparseserve.solvers.statistics import InputStatistics, relative_output_error


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """The parameters of one decoder layer that changed, and its report.

    ``parameters`` maps names in the layer, such as ``mlp.up_proj.weight``, to tensors in the
    orientation and dtype that the model stores. ``scales`` maps those of operators that were
    rounded to codes, such as ``mlp.up_proj``, to their scales ``[out, groups]``.
    """

    parameters: dict[str, Tensor]
    report: LayerReport
    scales: dict[str, Tensor] = field(default_factory=dict)

    def write_to(self, module: nn.Module) -> None:
        """Put the parameters into the decoder layer ``module``.

        Their memory is taken over, so that a layer that waits on the disk stays there. The weights
        of experts are views of what the model keeps in one tensor, and are copied.
        """
        experts = tuple(f"{name}." for name in experts_in(module))
        for name, value in self.parameters.items():
            parameter = module.get_parameter(name)
            if name.startswith(experts) or value.device != parameter.device:
                parameter.detach().copy_(value)
            else:
                parameter.data = value.to(parameter.dtype)


def prune_layer(
    context: LayerContext,
    recipe: PruneRecipe,
    progress: PruneProgress,
    output_error: OutputError | None,
    preparation: Preparation | None = None,
) -> PrunedLayer:
    """Prune every planned operator of the layer, in the order in which data reaches them.

    Args:
        context: The layer, and what enters it.
        recipe: How to prune.
        progress: Told of every operator.
        output_error: What the whole layer is trained to lower afterwards; None for no training.
        preparation: What is done to it first; None for nothing.

    Raises:
        NumericalError: Names the operator.
    """
    started = time.perf_counter()
    planned = planned_operators(context.layer, recipe)
    places = preparation or Preparation()
    with rotated_heads(context, places.heads, planned, recipe.pattern) as rotated:
        prepared, scaled = smoothed(rotated.context, places.channels, planned)
        layer = _prune_planned(prepared, planned, recipe, progress, output_error)
    return PrunedLayer(
        _changed(context, layer.module, layer.planned, recipe),
        LayerReport(
            context.layer.name,
            layer.operators,
            time.perf_counter() - started,
            layer.reconstruction,
            tuple(context.layer.full_name(operator) for operator in layer.unseen),
            rotated.reports,
            scaled,
        ),
        layer.scales,
    )


@dataclass(frozen=True, slots=True)
class _Pruned:
    """A pruned layer, which operators were pruned in it, and which no token reached."""

    module: nn.Module
    planned: Sequence[Operator]
    operators: tuple[OperatorReport, ...]
    unseen: Sequence[Operator]
    reconstruction: ReconstructionReport | None
    scales: dict[str, Tensor]


def _prune_planned(
    context: LayerContext,
    planned: Sequence[Operator],
    recipe: PruneRecipe,
    progress: PruneProgress,
    output_error: OutputError | None,
) -> _Pruned:
    groups = [
        group
        for group in context.layer.groups
        if any(operator in planned for operator in group.operators)
    ]
    pruned = copy_layer(context.module)
    statistics = GroupStatistics(context, pruned, groups, recipe.correction)
    reports: list[OperatorReport] = []
    unseen: list[Operator] = []
    scales: dict[str, Tensor] = {}
    for group in groups:
        operators = [operator for operator in group.operators if operator in planned]
        found = statistics.of(group)
        if not found.tokens:
            unseen += operators
            continue
        for stack in _stacks(operators, recipe):
            for operator, weight, scale, report in _prune_together(context, stack, found, recipe):
                set_layer_weight(pruned, operator, weight)
                if scale is not None:
                    scales[operator.name] = scale.cpu()
                reports.append(
                    replace(report, tokens=found.tokens) if group.experts is not None else report
                )
                progress.operator_pruned(reports[-1])
    planned = [operator for operator in planned if operator not in unseen]
    reconstruction = None
    if planned and output_error is not None:
        masked = [f"{operator.name}.weight" for operator in planned]
        pruned, reconstruction = reconstruct(
            context, pruned, masked, recipe.reconstruction, output_error
        )
    return _Pruned(pruned, planned, tuple(reports), unseen, reconstruction, scales)


def _stacks(operators: Sequence[Operator], recipe: PruneRecipe) -> list[list[Operator]]:
    """Return the operators of one input that are pruned as one matrix: all, or each alone.

    Where no row knows of another, the rows of several operators may be stacked: what depends on
    the input alone, such as a factorisation, is then done once.
    """
    if recipe.pattern.rows_are_independent and recipe.pruner.rows_are_independent:
        return [list(operators)]
    return [[operator] for operator in operators]


def _prune_together(
    context: LayerContext,
    operators: Sequence[Operator],
    statistics: InputStatistics,
    recipe: PruneRecipe,
) -> list[tuple[Operator, Tensor, Tensor | None, OperatorReport]]:
    """Prune ``operators``, stacked, and return each with its weight, scales and report."""
    started = time.perf_counter()
    names = [context.layer.full_name(operator) for operator in operators]
    dense = [layer_weight(context.module, operator) for operator in operators]
    try:
        result = recipe.pruner.prune(torch.cat(dense), statistics, recipe.pattern)
    except SparseServeError as error:
        raise type(error)(f"{', '.join(names)}: {error}") from error
    seconds = time.perf_counter() - started
    rows = [operator.out_features for operator in operators]
    weights = [
        _stored(context, operator.name, weight)
        for operator, weight in zip(operators, torch.split(result.weight, rows), strict=True)
    ]
    scales: Sequence[Tensor | None] = [None] * len(rows)
    if result.scales is not None:
        scales = torch.split(result.scales, rows)
    return [
        (
            operator,
            weight,
            scale,
            OperatorReport(
                name=name,
                shape=(weight.shape[0], weight.shape[1]),
                sparsity=float((weight == 0).float().mean()),
                relative_error=relative_output_error(weight, dense_weight, statistics),
                gram_products=result.gram_products,
                seconds=seconds * len(weight) / sum(rows),
                transposed=operator.transposed,
                converged=result.status.converged if result.status else None,
                residual=result.status.residual if result.status else None,
            ),
        )
        for operator, name, dense_weight, weight, scale in zip(
            operators, names, dense, weights, scales, strict=True
        )
    ]


def _stored(context: LayerContext, name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` as the model stores it: in its dtype, finite, without -0.0.

    Raises:
        NumericalError: It is not finite in that dtype.
    """
    # Adding zero turns the -0.0 that a kept weight may have become into 0.0.
    stored = tensor.to(context.storage_dtype) + 0.0
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(
            f"{context.layer.name}.{name}: the pruned weight is not finite in {stored.dtype}: "
            "choose --dtype bfloat16 or float32"
        )
    return stored


def _changed(
    context: LayerContext, pruned: nn.Module, planned: Sequence[Operator], recipe: PruneRecipe
) -> dict[str, Tensor]:
    """Return the parameters that differ from the dense ones, as the model stores them.

    Raises:
        NumericalError: One is not finite in the dtype it is stored in; names it.
    """
    weights = {f"{operator.name}.weight" for operator in planned}
    changed = {}
    for name, parameter in pruned.named_parameters():
        if name not in weights and torch.equal(parameter, context.module.get_parameter(name)):
            continue
        changed[name] = _stored(context, name.removesuffix(".weight"), parameter.detach()).cpu()
    for operator in planned:
        stored = changed[f"{operator.name}.weight"]
        violation = recipe.pattern.first_violation(stored.T if operator.transposed else stored)
        if violation:
            name = context.layer.full_name(operator)
            raise AssertionError(f"{name}: pattern {recipe.pattern} is broken at {violation}")
    return changed
