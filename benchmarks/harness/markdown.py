"""Markdown tables, and what stands under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def head(*cells: str) -> str:
    """Return the head of a table and the rule under it."""
    return f"{line(*cells)}\n|{'---|' * len(cells)}"


def line(*cells: str) -> str:
    """Return one row."""
    return f"| {' | '.join(cells)} |"


def distinct(items: Iterable[Any]) -> list[Any]:
    """Return the items, each once, in the order in which they come first."""
    return list(dict.fromkeys(items))


def pick(rows: Iterable[Mapping[str, Any]], key: str, **wanted: object) -> list[Any]:
    """Return ``key`` of the rows that have all that is ``wanted``."""
    return [found[key] for found in rows if all(found[name] == it for name, it in wanted.items())]


def commit_and_date(machine: Mapping[str, Any]) -> str:
    """Return the end of the note under a table: which code measured it, and when."""
    return f"commit {machine['commit']}, {machine['date']}."


def processor_and_software(machine: Mapping[str, Any]) -> str:
    """Return the note under a table: on what, with what, by which code and when."""
    return f"{machine['cpu']}, torch {machine['torch']}, {commit_and_date(machine)}"


def engine_software(result: Mapping[str, Any]) -> str:
    """Return the end of the note of a run under vLLM: the programs and the day."""
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{software}; {result['date'][:10]}."
