"""Values of settings that come from outside: their types, and numbers that no program can use."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from sparseserve.errors import RecipeError
from sparseserve.paths import shown_value

#: The largest whole number that PyTorch and NumPy take.
LARGEST_INTEGER = 2**63 - 1
_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "nothing",
}


def check_type(key: str, value: object, hint: object) -> None:
    """Refuse a ``value`` that is not what the annotation ``hint`` of a setting says.

    Raises:
        RecipeError: Names the key, the value and what is needed.
    """
    if not _fits(value, hint):
        raise RecipeError(f"'{key}' is {shown_value(value)}, but must be {_described(hint)}")


def check_numbers(settings: object) -> None:
    """Refuse numbers in a dataclass, and in those inside it, that cannot be computed with.

    Raises:
        RecipeError: One is infinite, not a number, or longer than 63 bits.
    """
    for name, value in _numbers("", settings):
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            # Of thousands of digits Python shows none.
            raise RecipeError(
                f"{name} has {value.bit_length()} bits: it must be at most {LARGEST_INTEGER}"
            )
        if not math.isfinite(value):
            raise RecipeError(f"{name} is {value}, but must be finite")


def _numbers(name: str, value: object) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(name, item)
    elif is_dataclass(value):
        for item in fields(value):
            inside = f"{name} {item.name}".lstrip()
            yield from _numbers(inside, getattr(value, item.name))


def _fits(value: object, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, item) for item in inside)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inside[0]) for item in value)
    if origin is Literal:
        return isinstance(value, str)  # which ones there are, the setting's owner says
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # Tables inside a table were checked when they were built.
    return hint not in _NAMES or isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(item) for item in inside if item is not type(None))
    if origin is tuple:
        return f"a list, each item {_described(inside[0])}"
    if origin is Literal:
        return "a text"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))
