"""The searches of lambda are compared at equal cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.research.operator_data import small_operator
from benchmarks.research.tables import RESEARCH_TABLES
from tests.benchmarks.script_runs import smoke_run, table_cells

pytestmark = pytest.mark.research
pytest.importorskip("optuna", reason="optuna comes with the extra 'research'")

from benchmarks.research import penalty_search  # noqa: E402  # imports optuna
from benchmarks.research.penalty_search import Trial, within  # noqa: E402


def test_a_smoke_run_measures_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    smoke_run(penalty_search, monkeypatch)


def test_only_trials_that_end_within_the_products_count() -> None:
    cheap = Trial(error=0.3, rounding=0.5, products=10)
    found = [cheap, replace(cheap, error=0.2), replace(cheap, error=0.1, products=11)]
    assert within(found, 20) == 0.2
    assert within(found, 31) == 0.1


def test_the_table_of_searches_has_every_budget() -> None:
    rows = list(penalty_search.compare(small_operator(), "wanda", (2, 3)))
    head, *lines = table_cells(RESEARCH_TABLES["penalty-search"], rows, rows=16, optuna="")
    assert head == ["search", "2 trials", "3 trials", "54 products", "81 products"]
    assert len(lines) == 5
    # More trials are never worse than fewer of the same run.
    relative = next(line for line in lines if line[0] == "bisection, relative interval")
    assert float(relative[2]) <= float(relative[1])
