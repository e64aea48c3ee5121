"""What a user interface hears of a run."""

from __future__ import annotations

from sparseserve.report import LayerReport, OperatorReport


class PruneProgress:
    """A listener that ignores everything; inherit from it and define what you want to hear."""

    def stage(self, text: str) -> None:
        """Something outside the loop over layers begins or ends; ``text`` says what."""

    def layer_started(self, name: str, number: int, total: int) -> None:
        """A decoder layer is about to be pruned; ``number`` counts from 1.

        Of layers that are pruned elsewhere, several at once, this is heard when one is done.
        """

    def operator_pruned(self, report: OperatorReport) -> None:
        """An operator is done."""

    def layer_finished(self, report: LayerReport) -> None:
        """A decoder layer is done, or was found on disk."""
