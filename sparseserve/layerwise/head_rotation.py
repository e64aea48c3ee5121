"""Rotating the values of a decoder layer's attention before it is pruned.

The rotated layer computes what the dense one does. So hidden states stay as they are, and only what
the operator behind the values reads is another vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor, nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.layers import copy_layer, group_inputs, layer_weight
from sparseserve.models.structure import Operator, OperatorGroup
from sparseserve.models.value_heads import ValueHeads
from sparseserve.report import RotationReport
from sparseserve.solvers.head_rotation import HeadWeights, LearnedRotations, learn_rotations
from sparseserve.solvers.statistics import StatisticsSum
from sparseserve.sparsity import SparsityPattern

# Learning adds a pass over so many windows at most, however many there are.
_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class RotatedLayer:
    """A layer that computes what the dense one does, ready to be pruned, and what was rotated."""

    context: LayerContext
    reports: tuple[RotationReport, ...]


@contextmanager
def rotated_heads(
    context: LayerContext,
    heads: Sequence[ValueHeads],
    planned: Sequence[Operator],
    pattern: SparsityPattern,
) -> Iterator[RotatedLayer]:
    """Rotate the values of the layer while the block runs.

    Args:
        context: The dense layer; left as it is.
        heads: Where its values may be rotated.
        planned: The operators that will be pruned. Only where values and what reads them are both
            among them is anything rotated: the others stay as they are in the source.
        pattern: What they will be pruned to.

    Raises:
        NumericalError: An input is not finite, or its second moment has no inverse.
        ArtifactError: The disk is full or cannot be written.
    """
    rotated = [place for place in heads if {place.values, place.outputs} <= set(planned)]
    if not rotated:
        yield RotatedLayer(context, ())
        return
    module = copy_layer(context.module)
    inputs = list(context.dense.inputs) if context.dense else []
    reports: list[RotationReport] = []
    written: list[HiddenStates] = []
    try:
        for place in rotated:
            learned = _learn(context, module, place, pattern)
            rotations = learned.rotations.to(context.device)
            place.rotate(module, rotations)
            number = _group_number(context, place.outputs)
            if inputs:
                inputs[number] = _turned_file(inputs[number], place, rotations.cpu().float())
                written.append(inputs[number])
            reports.append(
                RotationReport(
                    context.layer.full_name(place.values),
                    context.layer.full_name(place.outputs),
                    place.width,
                    learned.before,
                    learned.after,
                )
            )
        dense = context.dense and replace(context.dense, inputs=tuple(inputs))
        yield RotatedLayer(replace(context, module=module, dense=dense), tuple(reports))
    finally:
        for file in written:
            file.path.unlink(missing_ok=True)


def _learn(
    context: LayerContext, module: nn.Module, place: ValueHeads, pattern: SparsityPattern
) -> LearnedRotations:
    groups = [_group_of(context, place.values), _group_of(context, place.outputs)]
    value_gram, output_gram = _second_moments(context, module, groups)
    values = layer_weight(module, place.values)[place.start : place.start + place.rows]
    outputs = layer_weight(module, place.outputs)
    shape = (len(outputs), place.heads, place.shared_by, place.width)
    weights = HeadWeights(
        values.float().reshape(place.heads, place.width, -1),
        outputs.float().reshape(shape),
        value_gram,
        output_gram,
    )
    return learn_rotations(weights, pattern)


def _second_moments(
    context: LayerContext, module: nn.Module, groups: Sequence[OperatorGroup]
) -> list[Tensor]:
    totals = [
        StatisticsSum(group.in_features, corrected=False, device=context.device) for group in groups
    ]
    entering = context.dense.entering if context.dense else context.entering
    text = islice(context.windows(entering), context.scrambled, context.scrambled + _WINDOWS)
    for window, call in text:
        for total, found in zip(totals, group_inputs(module, window, call, groups), strict=True):
            total.add(found)
    return [total.finish().gram for total in totals]


def _turned_file(inputs: HiddenStates, place: ValueHeads, rotations: Tensor) -> HiddenStates:
    path = inputs.path.with_name(f"{inputs.path.name}-rotated")
    turned = (place.rotate_inputs(x.float(), rotations).to(x.dtype) for x in inputs)
    return HiddenStates.write(path, turned)


def _group_of(context: LayerContext, operator: Operator) -> OperatorGroup:
    return context.layer.common_groups[_group_number(context, operator)]


def _group_number(context: LayerContext, operator: Operator) -> int:
    groups = context.layer.common_groups
    return next(number for number, group in enumerate(groups) if operator in group.operators)
