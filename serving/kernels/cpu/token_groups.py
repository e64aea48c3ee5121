"""Which tokens each expert of a mixture multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class TokenGroup(NamedTuple):
    """Consecutive tokens that one weight multiplies.

    Attributes:
        weight: Its number.
        first: The first of them.
        tokens: How many.
    """

    weight: int
    first: int
    tokens: int


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Tokens in the order of the experts that a router chose for them.

    Attributes:
        rows: The token in each place, int64 ``[tokens * choices]``.
        places: Where each token's choices are, int64 ``[tokens, choices]``.
        groups: The experts that were chosen, and the places of their tokens.
    """

    rows: Tensor
    places: Tensor
    groups: tuple[TokenGroup, ...]

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> RoutedTokens:
        """Sort the choices of a router.

        Args:
            chosen: Numbers of experts, ``[tokens, choices]``.
            experts: How many there are.
        """
        flat = chosen.flatten().long()
        order = flat.argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        counts: list[int] = flat.bincount(minlength=experts).tolist()
        firsts = accumulate(counts, initial=0)
        groups = tuple(
            TokenGroup(weight, first, count)
            for weight, (first, count) in enumerate(zip(firsts, counts, strict=False))
            if count
        )
        return cls(order // chosen.shape[1], places.view(chosen.shape), groups)


def require_groups(groups: Sequence[TokenGroup], *, weights: int, tokens: int) -> None:
    """Refuse groups that leave the weights or the tokens.

    Raises:
        ValueError: Names the group.
    """
    for group in groups:
        inside = group.first >= 0 and group.tokens >= 0 and group.first + group.tokens <= tokens
        if not (inside and 0 <= group.weight < weights):
            raise ValueError(f"{group} of {weights} weights and {tokens} tokens")
