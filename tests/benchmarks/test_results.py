"""Results are written whole, and one file holds measurements of one setting only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.harness.markdown import head, line
from benchmarks.harness.results import (
    OtherSettingError,
    read_result,
    stored,
    write_result,
)
from benchmarks.quality import compare


@dataclass(frozen=True, slots=True)
class Setting:
    """A tuple and a mapping, which JSON knows otherwise or not at all."""

    samples: int = 16
    texts: tuple[str, ...] = ("speeches", "news")


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement."""

    method: str
    error: float


RUNS = [Run("admm", 0.5), Run("wanda", 0.75)]


def test_nothing_is_stored_before_the_first_run(tmp_path: Path) -> None:
    assert stored(tmp_path / "none.json", Setting()) == []


def test_runs_of_the_same_setting_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, Setting(), runs=RUNS, ours=None)
    assert [Run(**run) for run in stored(path, Setting())] == RUNS
    assert read_result(path)["machine"]["commit"]
    assert read_result(path)["ours"] is None


def test_rows_of_a_mapping_come_back_too(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"penalties": (1.0, 0.5)}, rows=RUNS)
    assert stored(path, {"penalties": (1.0, 0.5)}, "rows") == [
        {"method": "admm", "error": 0.5},
        {"method": "wanda", "error": 0.75},
    ]


@pytest.mark.parametrize(
    ("setting", "difference"),
    [
        (replace(Setting(), samples=4), "samples 16 there, 4 here"),
        (replace(Setting(), texts=("speeches",)), r"texts .* there, \['speeches'\] here"),
    ],
    ids=["number", "texts"],
)
def test_results_of_another_setting_are_not_continued(
    tmp_path: Path, setting: Setting, difference: str
) -> None:
    path = tmp_path / "result.json"
    write_result(path, Setting(), runs=RUNS)
    with pytest.raises(OtherSettingError, match=rf"another setting \({difference}\): choose"):
        stored(path, setting)


def test_a_setting_that_was_not_known_then_is_another(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"samples": 16}, runs=[])
    with pytest.raises(OtherSettingError, match="seed None there, 0 here"):
        stored(path, {"samples": 16, "seed": 0})


def test_a_command_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    write_result(tmp_path / "quality.json", {"model": "a"}, runs=[])
    run = CliRunner().invoke(compare.main, ["b", "--result", "quality.json"])
    (line,) = run.output.splitlines()
    assert "another setting (model 'a' there, 'b' here)" in line
    assert run.exit_code == 1


def test_a_head_and_its_lines_have_the_same_columns() -> None:
    assert head("", "dense", "2:4").splitlines() == ["|  | dense | 2:4 |", "|---|---|---|"]
    assert line("size", "4", "2") == "| size | 4 | 2 |"
