from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.quality import budget


@pytest.mark.further
def test_a_smoke_run_measures_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a smoke run wrote a result")

    monkeypatch.setattr(budget, "write_result", refuse)
    run = CliRunner().invoke(budget.main, ["--smoke"], catch_exceptions=False)
    assert run.exit_code == 0
    found = json.loads(next(line for line in run.output.splitlines() if line.startswith("{")))
    assert 0 < found["sparse_share"] <= 1
    assert found["increase"]["speeches"] < 10
