"""The second moments of a layer's operators under each kind of error correction.

    correction     X (what the target is computed from)     X* (what the pruned operator sees)
    none           dense layer on dense hidden states       the same
    intra          dense layer on dense hidden states       pruned layer on dense hidden states
    intra+inter    dense layer on dense hidden states       pruned layer on pruned hidden states
    sequential     dense layer on pruned hidden states      the same

``intra`` is FISTAPruner's (Zhao et al. 2025): an operator repairs the errors of the operators
before it in its layer, and layers stay independent. ``sequential`` is what SparseGPT and Wanda
do. With ``intra+inter`` the target is ``W0 (w X + (1 - w) X*)``: ``w`` = 1 repairs the errors of
all layers before in full, ``w`` = 0 accepts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from sparseserve.layerwise.streams import LayerRun
from sparseserve.models.layers import group_input, group_inputs
from sparseserve.models.structure import OperatorGroup
from sparseserve.recipe.steps import ErrorCorrection
from sparseserve.solvers.statistics import LayerStatistics


def group_statistics(
    run: LayerRun,
    pruned: nn.Module,
    groups: Sequence[OperatorGroup],
    correction: ErrorCorrection,
    weight: float,
) -> Iterator[LayerStatistics]:
    """Yield the statistics of each of ``groups`` in turn.

    Args:
        run: The layer and what enters it.
        pruned: The layer as far as it is pruned. The caller writes the new weights of a group
            into it before asking for the next one.
        groups: In the order in which data reaches them.
        correction: Which inputs to compare.
        weight: ``w`` above, in [0, 1]; plays a part in ``intra+inter`` only.
    """
    if correction == "sequential" or (correction == "none" and not run.dense_inputs):
        yield from _one_pass(run, groups, correction)
        return
    for group in groups:
        # Data reaches the first group unchanged, so there the two inputs are equal.
        first = group is run.layer.groups[0] and run.pruned_hidden is None
        if correction == "none" or first:
            yield _unpaired(run, group)
            continue
        statistics = _paired(run, pruned, group)
        yield statistics.mixed(weight) if correction == "intra+inter" else statistics


def _one_pass(
    run: LayerRun, groups: Sequence[OperatorGroup], correction: ErrorCorrection
) -> list[LayerStatistics]:
    collected = [
        LayerStatistics.empty(group.in_features, corrected=False, device=run.device)
        for group in groups
    ]
    for window in run.pruned_windows() if correction == "sequential" else run.dense_windows():
        inputs = group_inputs(run.dense, window, run.call, groups)
        collected = [part.updated(x) for part, x in zip(collected, inputs, strict=True)]
    return collected


def _unpaired(run: LayerRun, group: OperatorGroup) -> LayerStatistics:
    statistics = LayerStatistics.empty(group.in_features, corrected=False, device=run.device)
    for inputs in run.dense_group_inputs(group):
        statistics = statistics.updated(inputs)
    return statistics


def _paired(run: LayerRun, pruned: nn.Module, group: OperatorGroup) -> LayerStatistics:
    """Sum the second moments of a group's dense and pruned inputs, token by token."""
    statistics = LayerStatistics.empty(group.in_features, corrected=True, device=run.device)
    pairs = zip(run.dense_group_inputs(group), run.pruned_windows(), strict=True)
    for dense_inputs, window in pairs:
        pruned_inputs = group_input(pruned, window, run.call, group)
        statistics = statistics.updated(pruned_inputs, dense_inputs)
    return statistics
