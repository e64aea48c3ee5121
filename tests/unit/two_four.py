"""2:4 weights for property tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from sparseserve.sparsity import TWO_FOUR

GROUP_VALUES = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -3.0, 1e-30]), min_size=4, max_size=4
)


@st.composite
def two_four_weights(draw: st.DrawFn) -> torch.Tensor:
    """Weights that obey 2:4, with ties, zeros and negative zeros."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = [draw(GROUP_VALUES) for _ in range(rows * groups)]
    return TWO_FOUR.project(torch.tensor(values).reshape(rows, groups * 4))
