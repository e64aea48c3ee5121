"""The second moments of what a layer's operators read, under an error correction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparseserve.layerwise.expert_statistics import ExpertStatistics
from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.layers import group_input, group_inputs
from sparseserve.models.structure import OperatorGroup
from sparseserve.recipe.correction import ErrorCorrection
from sparseserve.solvers.statistics import InputStatistics, StatisticsSum


class GroupStatistics:
    """Answers for each group of operators with the statistics of the input that they share.

    Where no operator sees what was pruned before it in its layer, one pass over the windows may
    serve all groups; it is made when the first of them is asked for.
    """

    def __init__(
        self,
        context: LayerContext,
        pruned: nn.Module,
        groups: Sequence[OperatorGroup],
        correction: ErrorCorrection,
    ) -> None:
        """Look at nothing yet.

        Args:
            context: The layer and what enters it.
            pruned: The layer as far as it is pruned. The caller writes new weights into it, and
                each answer is about the layer as it is when it is asked.
            groups: Those that will be asked for.
            correction: Which inputs to compare.
        """
        self._context, self._pruned = context, pruned
        self._groups = [group for group in groups if group.experts is None]
        self._correction = correction
        self._of_all: list[InputStatistics] = []
        experts = [group for group in groups if group.experts is not None]
        self._experts = ExpertStatistics(context, pruned, experts, correction)

    def of(self, group: OperatorGroup) -> InputStatistics:
        """Return the statistics of what ``group`` reads; of no tokens for an expert that sees none.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
        context, correction = self._context, self._correction
        if group.experts is not None:
            return self._experts.of(group)
        if not correction.needs_dense or not (correction.paired or context.required_dense.inputs):
            self._of_all = self._of_all or self._one_pass()
            return self._of_all[self._groups.index(group)]
        # Data reaches the first group unchanged, so there the two inputs are equal.
        first = group is context.layer.groups[0] and not correction.chained
        if correction.paired and not first:
            return self._paired(group).mixed(correction.inter_weight)
        return self._unpaired(group)

    def _one_pass(self) -> list[InputStatistics]:
        context = self._context
        totals = [self._sum(group, corrected=False) for group in self._groups]
        dense = self._correction.needs_dense
        windows = context.required_dense.entering if dense else context.entering
        for window, call in context.windows(windows):
            inputs = group_inputs(context.module, window, call, self._groups)
            for total, x in zip(totals, inputs, strict=True):
                total.add(x)
        return [total.finish() for total in totals]

    def _unpaired(self, group: OperatorGroup) -> InputStatistics:
        total = self._sum(group, corrected=False)
        for inputs in self._context.dense_group_inputs(group):
            total.add(inputs)
        return total.finish()

    def _paired(self, group: OperatorGroup) -> InputStatistics:
        """Sum the second moments of a group's dense and pruned inputs, token by token."""
        context, total = self._context, self._sum(group, corrected=True)
        windows = context.windows(context.entering)
        for dense_inputs, (window, call) in zip(
            context.dense_group_inputs(group), windows, strict=True
        ):
            total.add(group_input(self._pruned, window, call, group), dense_inputs)
        return total.finish()

    def _sum(self, group: OperatorGroup, *, corrected: bool) -> StatisticsSum:
        return StatisticsSum(group.in_features, corrected=corrected, device=self._context.device)
