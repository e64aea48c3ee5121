"""The arguments a model gives one of its decoder layers, apart from the hidden states."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparseserve.devices import autocast
from sparseserve.errors import UnsupportedModelError
from sparseserve.models.hooks import hidden_argument

# Some models hand a UserDict from layer to layer, so that all write into one.
Argument: TypeAlias = (
    "Tensor | bool | int | float | str | torch.dtype | torch.device | tuple[Argument, ...]"
    " | list[Argument] | dict[str | int, Argument] | UserDict[str | int, Argument] | None"
)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one layer.

    Attributes:
        layer: Full name of the layer, for messages.
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments: attention mask, position embeddings and the like.
        hidden_keyword: Keyword of the hidden states; None when they come first by position.
        varying: Which of the others depend on the tokens, by keyword or by place from 1. Their
            values are those of one window.
        autocast_to: What the layer's products are rounded to; None leaves them alone.
    """

    layer: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    hidden_keyword: str | None = None
    varying: tuple[str, ...] = ()
    autocast_to: torch.dtype | None = None

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

        ``hidden`` and containers are left untouched even by a layer that works in place.
        """
        return self.run(layer, hidden)[0]

    def run(self, layer: nn.Module, hidden: Tensor) -> tuple[object, list[Tensor]]:
        """Call ``layer`` and return what it returns, and the tensors that it hands to later ones.

        These are what it put into a container among its arguments.
        """
        hidden = hidden.clone()
        args = [_mapped(value, _same) for value in self.args]
        kwargs = {name: _mapped(value, _same) for name, value in self.kwargs.items()}
        with autocast(hidden.device, self.autocast_to):
            if self.hidden_keyword is not None:
                output = layer(*args, **{**kwargs, self.hidden_keyword: hidden})
            else:
                output = layer(hidden, *args, **kwargs)
        found: list[Tensor] = []
        given: list[Tensor] = []
        for value in (*args, *kwargs.values()):
            _collect(value, found)
        for _, value in self._named():
            _collect(value, given)
        known = {id(tensor) for tensor in given}
        return output, [tensor for tensor in found if id(tensor) not in known]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> LayerCall:
        """Return the call with its tensors on ``device``, the floating ones as ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return self._with({name: _mapped(value, move) for name, value in self._named()})

    def compared(self, other: LayerCall) -> LayerCall:
        """Return the call with ``varying`` set to what differs in the ``other``, of other tokens.

        Raises:
            UnsupportedModelError: More than the values of tensors differs.
        """
        ours, theirs = dict(self._named()), dict(other._named())
        differ = [name for name in ours if not _equal(ours[name], theirs.get(name))]
        for name in [*differ, *(theirs.keys() - ours.keys())]:
            if not _alike(ours.get(name), theirs.get(name)):
                raise UnsupportedModelError(
                    f"{self.layer}: argument {name} has another form for other tokens, so the "
                    "layer cannot run apart from the model; such models are not supported"
                )
        return replace(self, varying=tuple(differ))

    def varying_tensors(self) -> list[Tensor]:
        """Return the tensors in the varying arguments, in a fixed order."""
        named, found = dict(self._named()), list[Tensor]()
        for name in self.varying:
            _collect(named[name], found)
        return found

    def filled(self, tensors: Iterable[Tensor]) -> LayerCall:
        """Return the call with these instead of ``varying_tensors``."""
        rest = iter(tensors)
        named = dict(self._named())
        return self._with(
            {name: _mapped(named[name], lambda _: next(rest)) for name in self.varying}
        )

    def _with(self, values: Mapping[str, Argument]) -> LayerCall:
        """Return the call with other values of some arguments."""
        return replace(
            self,
            args=tuple(values.get(str(index + 1), value) for index, value in enumerate(self.args)),
            kwargs={name: values.get(name, value) for name, value in self.kwargs.items()},
        )

    def _named(self) -> Iterator[tuple[str, Argument]]:
        yield from ((str(index + 1), value) for index, value in enumerate(self.args))
        yield from self.kwargs.items()


def _checked(layer: str, name: str, value: object) -> Argument:
    if isinstance(value, tuple):
        return tuple(_checked(layer, name, item) for item in value)
    if isinstance(value, list):
        return [_checked(layer, name, item) for item in value]
    if isinstance(value, dict | UserDict):
        return _alike_mapping(value, {k: _checked(layer, name, v) for k, v in value.items()})
    if value is None or isinstance(
        value, (Tensor, bool, int, float, str, torch.dtype, torch.device)
    ):
        return value
    raise UnsupportedModelError(
        f"{layer}: argument {name} is a {type(value).__name__}, which cannot be replayed for other "
        "tokens; only tensors, plain values and containers of them can"
    )


def _mapped(value: Argument, change: Callable[[Tensor], Tensor]) -> Argument:
    """Return a copy of ``value`` whose tensors are changed; containers are new."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict | UserDict):
        return _alike_mapping(value, {k: _mapped(v, change) for k, v in value.items()})
    return value


def _alike_mapping(
    kind: dict[Any, Any] | UserDict[Any, Any], items: dict[str | int, Argument]
) -> Argument:
    return type(kind)(items) if isinstance(kind, UserDict) else items


def _collect(value: Argument, found: list[Tensor]) -> None:
    """Append the tensors in ``value`` in a fixed order."""

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(value, keep)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _equal(left: Argument, right: Argument) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return _both(left, right, _equal)


def _alike(left: Argument, right: Argument) -> bool:
    """Whether two values differ in the numbers in their tensors at most."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape
    return _both(left, right, _alike)


def _both(left: Argument, right: Argument, same: Callable[[Argument, Argument], bool]) -> bool:
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict | UserDict) and isinstance(right, dict | UserDict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return left == right
