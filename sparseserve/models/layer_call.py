"""The arguments a model gives one of its decoder layers, apart from the hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.hooks import hidden_argument

Argument: TypeAlias = (
    "Tensor | bool | int | float | str | torch.dtype | torch.device"
    " | tuple[Argument, ...] | list[Argument] | dict[str, Argument] | None"
)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one layer, whatever the tokens are.

    Attributes:
        layer: Full name of the layer, for messages.
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments: attention mask, position embeddings and the like.
        hidden_keyword: Keyword of the hidden states; None when they come first by position.
    """

    layer: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    hidden_keyword: str | None = None

    @classmethod
    def from_model(
        cls, layer: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[Tensor, LayerCall]:
        """Split the arguments that a hook saw into the hidden states and everything else.

        Raises:
            UnsupportedModelError: There are no hidden states, or another argument is an object,
                such as a cache, that cannot be replayed for other tokens.
        """
        place = hidden_argument(args, kwargs)
        if place is None:
            raise UnsupportedModelError(f"{layer} receives no hidden states")
        keyword = place if isinstance(place, str) else None
        hidden = args[0] if keyword is None else kwargs[keyword]
        assert isinstance(hidden, Tensor)
        rest = {
            name: _checked(layer, name, value) for name, value in kwargs.items() if name != keyword
        }
        others = tuple(_checked(layer, str(i + 1), value) for i, value in enumerate(args[1:]))
        return hidden, cls(layer, others, rest, keyword)

    def apply(self, layer: nn.Module, hidden: Tensor) -> object:
        """Call ``layer`` on ``hidden`` ``[1, T, hidden]`` with these arguments.

        ``hidden`` is left untouched even by a layer that works in place.
        """
        hidden = hidden.clone()
        if self.hidden_keyword is not None:
            return layer(*self.args, **{**self.kwargs, self.hidden_keyword: hidden})
        return layer(hidden, *self.args, **self.kwargs)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """Return the call with its tensors on ``device``, the floating ones as ``dtype``."""
        return LayerCall(
            self.layer,
            tuple(_moved(value, device, dtype) for value in self.args),
            {name: _moved(value, device, dtype) for name, value in self.kwargs.items()},
            self.hidden_keyword,
        )

    def first_difference(self, other: LayerCall) -> str | None:
        """Return the name of the first argument in which two calls differ; None when none does."""
        ours, theirs = dict(self._named()), dict(other._named())
        for name in [*ours, *theirs]:
            if name not in ours or name not in theirs or not _equal(ours[name], theirs[name]):
                return name
        return None

    def _named(self) -> Iterator[tuple[str, Argument]]:
        yield from ((str(index + 1), value) for index, value in enumerate(self.args))
        yield from self.kwargs.items()


def _checked(layer: str, name: str, value: object) -> Argument:
    if isinstance(value, tuple):
        return tuple(_checked(layer, name, item) for item in value)
    if isinstance(value, list):
        return [_checked(layer, name, item) for item in value]
    if isinstance(value, dict):
        return {str(key): _checked(layer, name, item) for key, item in value.items()}
    if value is None or isinstance(
        value, (Tensor, bool, int, float, str, torch.dtype, torch.device)
    ):
        return value
    raise UnsupportedModelError(
        f"{layer}: argument {name} is a {type(value).__name__}, which cannot be replayed for other "
        "tokens; only tensors, plain values and containers of them can"
    )


def _moved(value: Argument, device: torch.device, dtype: torch.dtype | None) -> Argument:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, tuple):
        return tuple(_moved(item, device, dtype) for item in value)
    if isinstance(value, list):
        return [_moved(item, device, dtype) for item in value]
    if isinstance(value, dict):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    return value


def _equal(left: Argument, right: Argument) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return left == right
