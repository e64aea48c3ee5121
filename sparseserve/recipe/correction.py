"""Error correction: which inputs an operator's target comes from, and which ones it sees.

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

from dataclasses import dataclass, replace

from sparseserve.errors import RecipeError, unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCorrection:
    """What an error correction needs; everything that depends on it asks here.

    Attributes:
        needs_dense: The target comes from what the dense model's hidden states become.
        chained: A layer sees what the pruned layers before it produce, so layers depend on each
            other.
        paired: ``X`` and ``X*`` differ, and are summed token by token.
        inter_weight: ``w`` above; 1 where the target is ``W0 X`` as it stands.
    """

    needs_dense: bool
    chained: bool
    paired: bool
    inter_weight: float = 1.0

    @classmethod
    def named(cls, name: str, inter_weight: float) -> ErrorCorrection:
        """Return the correction called ``name``; ``inter_weight`` matters to ``intra+inter`` only.

        Raises:
            RecipeError: There is none of that name, or the weight is not from 0 to 1.
        """
        if name not in CORRECTIONS:
            raise RecipeError(unknown_name("error_correction", name, CORRECTIONS))
        if not 0 <= inter_weight <= 1:
            raise RecipeError(f"inter_weight {inter_weight} must be between 0 and 1")
        found = CORRECTIONS[name]
        return replace(found, inter_weight=inter_weight) if name == "intra+inter" else found


CORRECTIONS = {
    "none": ErrorCorrection(needs_dense=True, chained=False, paired=False),
    "intra": ErrorCorrection(needs_dense=True, chained=False, paired=True),
    "intra+inter": ErrorCorrection(needs_dense=True, chained=True, paired=True),
    "sequential": ErrorCorrection(needs_dense=False, chained=True, paired=False),
}
