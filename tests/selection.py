"""Which cases of a module run, for fixtures that make something expensive for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytest
from _pytest.mark import ParameterSet


def representatives(every: Iterable[str], chosen: Collection[str]) -> list[ParameterSet]:
    """Return parameters for a test: those that are not ``chosen`` run with ``make test-all``."""
    return [
        pytest.param(name, marks=() if name in chosen else pytest.mark.further) for name in every
    ]


def selected(request: pytest.FixtureRequest, *names: str) -> set[str]:
    """Return the values that tests of the requesting module have for the parameters ``names``."""
    found: set[str] = set()
    for item in request.session.items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and item.path == request.path:
            found |= {str(callspec.params[name]) for name in names if name in callspec.params}
    return found
