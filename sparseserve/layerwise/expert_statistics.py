"""The second moments of what the experts of a layer read.

An expert sees the tokens that the router of the dense layer sends to it; the pruned layer is made
to send it the same ones, so that the two can be compared. No expert waits for another, so many are
served by one pass over the windows: as many as their statistics find room in memory.

An expert that sees fewer tokens than its operator has inputs says nothing about some directions.
There the layer's mean token fills up what the experts read first, so that the two together weigh as
much as there are inputs. What follows inside an expert are features of its own, which those of no
other expert are like; there every feature keeps its own energy, and none goes with another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sparseserve.huggingface.experts import ExpertLinears, recorded_routing, replayed_routing
from sparseserve.layerwise.streams import LayerContext
from sparseserve.models.layers import group_inputs
from sparseserve.models.structure import Operator, OperatorGroup
from sparseserve.recipe.correction import ErrorCorrection
from sparseserve.solvers.statistics import InputStatistics, StatisticsSum, moment_bytes

#: What the statistics of the experts that are served by one pass may take.
BLOCK_BYTES = 2**31


class ExpertStatistics:
    """Answers for each group of operators of an expert with the statistics of its input."""

    def __init__(
        self,
        context: LayerContext,
        pruned: nn.Module,
        groups: Sequence[OperatorGroup],
        correction: ErrorCorrection,
    ) -> None:
        """Look at nothing yet; see :class:`GroupStatistics` for the arguments."""
        self._context, self._pruned = context, pruned
        self._groups, self._correction = list(groups), correction
        self._found: dict[OperatorGroup, InputStatistics] = {}

    def of(self, group: OperatorGroup) -> InputStatistics:
        """Return the statistics of what ``group`` reads; ``tokens`` may be none.

        Raises:
            NumericalError: An activation is NaN or infinite.
        """
        if group not in self._found:
            self._found = self._one_pass(self._block_from(group))
        return self._found.pop(group)

    @property
    def _paired(self) -> bool:
        return self._correction.needs_dense and self._correction.paired

    def _block_from(self, group: OperatorGroup) -> list[OperatorGroup]:
        """Return ``group`` and those after it that one pass can serve."""
        moments = 3 if self._paired else 1
        room = max(1, BLOCK_BYTES // (moments * moment_bytes(group.in_features)))
        first = self._groups.index(group)
        return [
            other
            for other in self._groups[first : first + room]
            if other.experts == group.experts
            and self._reads_hidden_states(other) == self._reads_hidden_states(group)
        ]

    def _one_pass(self, block: Sequence[OperatorGroup]) -> dict[OperatorGroup, InputStatistics]:
        device = self._context.device
        # The tokens that enter all experts stand for those that one of them does not see.
        common = [_entering(block[0])] if self._reads_hidden_states(block[0]) else []
        read = [*block, *common]
        totals = [
            StatisticsSum(group.in_features, corrected=self._paired, device=device)
            for group in read
        ]
        for inputs, dense_inputs in self._inputs(read):
            for total, x, dense in zip(totals, inputs, dense_inputs, strict=True):
                total.add(x, dense)
        found = [total.finish().mixed(self._correction.inter_weight) for total in totals]
        others = found[-1] if common else None
        return {
            group: own.filled(others, group.in_features) if own.tokens else own
            for group, own in zip(block, found, strict=False)
        }

    def _inputs(
        self, groups: Sequence[OperatorGroup]
    ) -> Iterator[tuple[list[Tensor], Sequence[Tensor | None]]]:
        """Yield what ``groups`` read in the pruned layer and in the dense one, window by window."""
        context = self._context
        dense = self._correction.needs_dense
        windows = context.windows(context.required_dense.entering if dense else context.entering)
        if not self._paired:
            for window, call in windows:
                yield group_inputs(context.module, window, call, groups), [None] * len(groups)
            return
        for (dense_window, call), (window, _) in zip(
            windows, context.windows(context.entering), strict=True
        ):
            with recorded_routing(context.module) as routing:
                dense_inputs = group_inputs(context.module, dense_window, call, groups)
            with replayed_routing(self._pruned, routing):
                inputs = group_inputs(self._pruned, window, call, groups)
            yield inputs, dense_inputs

    def _reads_hidden_states(self, group: OperatorGroup) -> bool:
        assert group.experts is not None
        experts = self._context.module.get_submodule(group.experts)
        assert isinstance(experts, ExpertLinears)
        return group.operators[0].name.rpartition(".")[2] in experts.stacks[0].projections


def _entering(group: OperatorGroup) -> OperatorGroup:
    """Return the experts of ``group`` as if they were one operator."""
    assert group.experts is not None
    width = group.in_features
    return OperatorGroup((Operator(group.experts, out_features=width, in_features=width),))
