"""What passed, what failed and what was skipped and why, from pytest's JUnit file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

Outcome = Literal["passed", "failure", "error", "skipped"]
BAD: tuple[Outcome, ...] = ("failure", "error")


@dataclass(frozen=True, slots=True)
class Case:
    """One test case: the dotted name of its module, its name, and how it ended.

    ``reason`` is that of a skipped case.
    """

    module: str
    name: str
    outcome: Outcome
    reason: str = ""

    @property
    def function(self) -> str:
        """The name without its parameters."""
        return self.name.partition("[")[0]


def read_cases(report: Path) -> list[Case]:
    """Return the cases of a JUnit ``report``; a case that failed and erred counts as a failure."""
    return [_case(element) for element in ElementTree.parse(report).iter("testcase")]


def counts(cases: Iterable[Case], key: Callable[[Case], str]) -> dict[str, dict[str, int]]:
    """Count the outcomes of the cases that have the same ``key``, in the order of the first."""
    found: dict[str, Counter[str]] = {}
    for case in cases:
        found.setdefault(key(case), Counter())[case.outcome] += 1
    return {name: dict(each) for name, each in found.items()}


def skip_reasons(cases: Iterable[Case]) -> dict[str, int]:
    """Return how many cases were skipped for each reason."""
    return dict(Counter(case.reason for case in cases if case.outcome == "skipped"))


def _case(element: ElementTree.Element) -> Case:
    tags = {child.tag: child for child in element}
    ways: tuple[Outcome, ...] = get_args(Outcome)
    outcome: Outcome = next((way for way in ways if way in tags), "passed")
    reason = tags["skipped"].get("message", "") if outcome == "skipped" else ""
    return Case(element.get("classname", ""), element.get("name", ""), outcome, reason)
