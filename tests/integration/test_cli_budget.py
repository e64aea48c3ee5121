"""Budgets and sensitivities as scripts see them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparseserve.budget.price_run import HeldOutSpec
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.workflow.job import Job
from tests.integration.command_line import Cli, prune_arguments, refusal


def test_a_run_prunes_within_its_budget_and_says_so(cli: Cli, llama: Path, text: Path) -> None:
    budget = ["--max-perplexity-increase", "100000%", "--method", "magnitude"]
    done = cli(*prune_arguments(llama, text, "-o", "out", *budget))
    assert done.returncode == 0, done.stderr
    assert re.search(r"pruned share +100\.0% of", done.stdout)
    assert "at most +" in done.stdout
    manifest = json.loads(Path("out/sparseserve.json").read_text())
    assert len(manifest["report"]["budget"]["sensitivities"]) == 8


def test_the_ranking_alone_is_printed_plotted_and_written(
    cli: Cli, llama: Path, text: Path
) -> None:
    done = cli("sensitivity", *prune_arguments(llama, text)[1:])
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.gate_proj+up_proj" in done.stdout
    assert Path("llama-sensitivity/sensitivity.html").stat().st_size > 1_000_000
    again = cli("sensitivity", *prune_arguments(llama, text, "-o", "other", "--json")[1:])
    assert json.loads(again.stdout) == json.loads(
        Path("llama-sensitivity/sensitivity.json").read_text()
    )


def test_the_ranking_of_the_current_folder_has_its_name(
    cli: Cli, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama)
    folders = []

    def note(job: Job, folder: Path, *, held_out: HeldOutSpec) -> tuple[UnitSensitivity, ...]:
        folders.append(folder)
        return ()

    monkeypatch.setattr("sparseserve.budget.ranking.measure_and_report", note)
    done = cli("sensitivity", *prune_arguments(Path(), text)[1:])
    assert done.returncode == 0, done.stderr
    assert folders == [Path("llama-sensitivity")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-perplexity-increase", "10"], "percent sign"),
        (["--max-perplexity-increase", "much"], "is not a share"),
        (["--max-perplexity-increase=-3%"], "is not a share"),
        (["--max-perplexity-increase", "0"], "must be above 0"),
        (["--keep-dense-fraction", "100%"], "below 1"),
        (["--keep-dense-fraction", "20%", "--samples", "1000"], "give more text"),
        (["--max-perplexity-increase", "0.000001%"], "stay dense"),
        (["--keep-dense-fraction", "20%", "--validation", "./missing.txt"], "does not exist"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_one_line(
    cli: Cli, llama: Path, text: Path, options: list[str], message: str
) -> None:
    done = cli(*prune_arguments(llama, text, "-o", "out", *options))
    assert message in refusal(done)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--keep-dense-fraction", "20%", "--max-perplexity-increase", "10%"],
        ["--keep-dense-fraction", "20%", "--dry-run"],
        ["--validation", "text.txt"],
        ["--keep-dense-fraction", "20%"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    cli: Cli, llama: Path, text: Path, options: list[str]
) -> None:
    done = cli(*prune_arguments(llama, text, *options))
    assert done.returncode == 2


def test_a_missing_plotting_package_is_named_before_any_work(
    cli: Cli, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseserve.budget.ranking_plot.find_spec", lambda name: None)
    done = cli("sensitivity", *prune_arguments(llama, text)[1:])
    assert "pip install 'sparseserve[plots]'" in refusal(done)
    assert "loading" not in done.stderr
