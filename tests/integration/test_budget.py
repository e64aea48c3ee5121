"""A tiny model within a budget, from the command line's functions down to the checkpoint."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sparseserve.budget.price_run import HeldOutSpec
from sparseserve.budget.ranking import measure_and_report
from sparseserve.budget.report import (
    BudgetReport,
    Goal,
    KeepDenseFraction,
    MaxPerplexityIncrease,
)
from sparseserve.budget.within_budget import prune_within_budget
from sparseserve.checkpoint.artifact import CARD_FILE, Artifact
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError, CalibrationError, RecipeError
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import OperatorReport
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job

FEW = HeldOutSpec(sensitivity_windows=2, validation_windows=4)
ALL = 14  # linears of the two layers of a tiny Llama
AT_THE_END = "writing the checkpoint"

Within = Callable[..., tuple[Artifact, BudgetReport]]


@pytest.fixture
def within(llama: Path, tmp_path: Path, quick: PruneRecipe) -> Within:
    def run(
        goal: Goal,
        name: str = "out",
        *,
        recipe: PruneRecipe = quick,
        progress: PruneProgress | None = None,
        held_out: HeldOutSpec = FEW,
        rounds: int = 4,
        export_format: str | None = None,
    ) -> tuple[Artifact, BudgetReport]:
        job = Job(str(llama), recipe, export_format, progress=progress or PruneProgress())
        return prune_within_budget(job, tmp_path / name, goal, held_out=held_out, rounds=rounds)

    return run


def test_a_generous_budget_prunes_everything(within: Within) -> None:
    artifact, report = within(MaxPerplexityIncrease(1e6))
    assert report.chosen.sparse_share == 1
    assert report.chosen.dense_operators == ()
    assert len(artifact.manifest.pruned) == ALL
    assert len(report.rounds) == 1


def test_an_impossible_budget_leaves_nothing_but_the_reason(within: Within, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pruning .* alone, the cheapest of 8, raises"):
        within(MaxPerplexityIncrease(1e-9))
    assert not (tmp_path / "out").exists()


def test_what_is_published_is_the_most_that_stays_within(within: Within, tmp_path: Path) -> None:
    _, everything = within(MaxPerplexityIncrease(1e6), "all")
    budget = math.expm1(everything.chosen.bound / 2)
    artifact, report = within(MaxPerplexityIncrease(budget))
    affordable = [item for item in report.rounds if item.bound <= math.log1p(budget)]
    assert report.chosen == max(affordable, key=lambda item: item.sparse_share)
    assert 0 < report.chosen.sparse_share < 1
    assert set(artifact.manifest.pruned).isdisjoint(report.chosen.dense_operators)
    assert len(artifact.manifest.pruned) + len(report.chosen.dense_operators) == ALL
    assert (
        artifact.manifest.report["budget"]["chosen"]["sparse_share"] == report.chosen.sparse_share
    )
    assert report.weight_bytes == artifact.checkpoint.weight_bytes
    verify(artifact.path)
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_a_fraction_to_keep_is_the_most_that_stays_dense(within: Within) -> None:
    artifact, report = within(KeepDenseFraction(0.4))
    assert 0.6 <= report.chosen.sparse_share < 1
    weights = {name: unit.weights for unit in report.sensitivities for name in unit.operators[:1]}
    kept = sum(weights.get(name, 0) for name in report.chosen.dense_operators)
    assert kept / report.prunable_weights == pytest.approx(1 - report.chosen.sparse_share)
    assert len(artifact.manifest.pruned) + len(report.chosen.dense_operators) == ALL


def test_what_the_recipe_ignores_is_no_part_of_the_shares(
    within: Within, quick: PruneRecipe
) -> None:
    recipe = replace(quick, ignore=("down_proj",))
    artifact, report = within(MaxPerplexityIncrease(1e6), recipe=recipe)
    assert report.chosen.sparse_share == 1
    assert len(artifact.manifest.pruned) == ALL - 2
    assert report.prunable_weights == sum(unit.weights for unit in report.sensitivities)


@pytest.mark.parametrize("correction", ["intra", "sequential"])
def test_reused_layers_give_the_same_bytes_as_a_fresh_run(
    within: Within, quick: PruneRecipe, correction: str
) -> None:
    recipe = replace(quick, error_correction=correction)
    whole, everything = within(MaxPerplexityIncrease(1e6), "all", recipe=recipe)
    budget = MaxPerplexityIncrease(math.expm1(everything.chosen.bound / 2))
    artifact, report = within(budget, "searched", recipe=recipe)
    assert len(report.rounds) > 1
    pruned = sum(unit.weights for unit in report.sensitivities) * report.chosen.sparse_share
    fraction = 1 - (pruned - 1) / report.prunable_weights
    again, fresh = within(KeepDenseFraction(fraction), "fresh", recipe=recipe)
    assert fresh.chosen.dense_operators == report.chosen.dense_operators
    for name in ("model.safetensors",):
        assert again.manifest.files[name].sha256 == artifact.manifest.files[name].sha256
    assert whole.manifest.files[name].sha256 != artifact.manifest.files[name].sha256


class Killed(Exception):
    pass


class Watch(PruneProgress):
    """Notes every pruned operator; dies after so many, or at a stage that begins so."""

    def __init__(self, dies_after: int | None = None, *, dies_at: str | None = None) -> None:
        self.names: list[str] = []
        self.dies_after = dies_after
        self.dies_at = dies_at

    def stage(self, text: str) -> None:
        if self.dies_at is not None and text.startswith(self.dies_at):
            raise Killed

    def operator_pruned(self, report: OperatorReport) -> None:
        self.names.append(report.name)
        if len(self.names) == self.dies_after:
            raise Killed


def test_layers_that_stay_the_same_are_not_pruned_again(within: Within, quick: PruneRecipe) -> None:
    recipe = replace(quick, error_correction="intra")
    _, before = within(KeepDenseFraction(0.06), "before", recipe=recipe)
    with pytest.raises(Killed):
        within(KeepDenseFraction(0.06), recipe=recipe, progress=Watch(dies_at=AT_THE_END))
    again, other = Watch(dies_at=AT_THE_END), Watch()
    with pytest.raises(Killed):
        within(KeepDenseFraction(0.06), recipe=recipe, progress=again)
    assert again.names == []
    _, after = within(KeepDenseFraction(0.12), recipe=recipe, progress=other)
    moved = set(before.chosen.dense_operators) ^ set(after.chosen.dense_operators)
    changed = {layer for layer in ("layers.0.", "layers.1.") if any(layer in x for x in moved)}
    assert len(changed) == 1
    assert {name.partition("layers.")[2][:2] for name in other.names} == {
        layer.removeprefix("layers.") for layer in changed
    }


@pytest.mark.parametrize("operators", [10, 20])
def test_a_killed_run_goes_on_and_ends_alike(
    within: Within, tmp_path: Path, operators: int
) -> None:
    undisturbed, expected = within(KeepDenseFraction(0.4), "undisturbed")
    with pytest.raises(Killed):
        within(KeepDenseFraction(0.4), progress=Watch(operators))
    assert not (tmp_path / "out").exists()
    artifact, report = within(KeepDenseFraction(0.4))
    assert report == expected
    files = [(item, entry.sha256) for item, entry in undisturbed.manifest.files.items()]
    assert files == [(item, entry.sha256) for item, entry in artifact.manifest.files.items()]


def test_a_disk_that_fills_up_at_the_card_leaves_a_run_that_goes_on_and_ends_whole(
    within: Within, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text
    cards = count(1)

    def full_at_the_second_card(path: Path, data: str, **how: Any) -> int:
        if path.name == f"{CARD_FILE}.tmp" and next(cards) == 2:
            write_text(path, data[:100], **how)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, data, **how)

    monkeypatch.setattr(Path, "write_text", full_at_the_second_card)
    with pytest.raises(ArtifactError, match=r"README\.md: cannot be written \(No space left"):
        within(KeepDenseFraction(0.4))
    assert not list(tmp_path.rglob("*.tmp"))
    artifact, _ = within(KeepDenseFraction(0.4))
    assert verify(tmp_path / "out").manifest == artifact.manifest
    assert not [name for name in artifact.manifest.files if name.endswith(".tmp")]


def test_a_format_for_other_programs_is_made_of_the_model_that_was_chosen(
    within: Within, tmp_path: Path
) -> None:
    artifact, report = within(KeepDenseFraction(0.4), export_format="onnx")
    manifest = verify(tmp_path / "out").manifest
    assert manifest.format == "onnx"
    assert manifest.report["budget"]["chosen"]["sparse_share"] == report.chosen.sparse_share
    assert len(manifest.pruned) + len(report.chosen.dense_operators) == ALL
    assert report.weight_bytes == artifact.weight_bytes
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_run_that_goes_on_with_another_format_ends_in_that(
    within: Within, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        within(KeepDenseFraction(0.4), progress=Watch(dies_at="measured "))
    watch = Watch()
    artifact, _ = within(KeepDenseFraction(0.4), export_format="dense", progress=watch)
    assert verify(tmp_path / "out").manifest.format == artifact.manifest.format == "dense"
    assert watch.names == []  # its layers are those that were pruned before


def test_an_unfinished_run_of_another_recipe_is_not_mixed_in(
    within: Within, quick: PruneRecipe
) -> None:
    with pytest.raises(Killed):
        within(KeepDenseFraction(0.4), progress=Watch(3))
    with pytest.raises(ArtifactError, match="unfinished run"):
        within(KeepDenseFraction(0.4), recipe=replace(quick, ignore=("v_proj",)))


def test_a_text_that_chose_the_operators_is_refused_for_evaluation(
    within: Within, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{i * i} is the square of {i}." for i in range(200)))
    spec = replace(FEW, texts=(str(other),))
    _, report = within(KeepDenseFraction(0.4), held_out=spec)
    assert [item.text for item in report.chosen.measured] == ["other.txt"]
    with pytest.raises(CalibrationError, match=r"other\.txt"):
        evaluate(str(tmp_path / "out"), EvaluationSpec(text=str(other), sequence_length=16))


def test_two_texts_are_both_kept_within_the_budget(within: Within, tmp_path: Path) -> None:
    names = []
    for step in (3, 5):
        file = tmp_path / f"{step}.txt"
        file.write_text("\n".join(f"{i * step} comes after {i}." for i in range(200)))
        names.append(str(file))
    spec = replace(FEW, texts=tuple(names))
    _, report = within(MaxPerplexityIncrease(1e6), held_out=spec)
    assert [item.text for item in report.chosen.measured] == ["3.txt", "5.txt"]
    assert report.chosen.bound == max(item.bound for item in report.chosen.measured)
    assert {len(unit.divergences) for unit in report.sensitivities} == {4}


def test_experts_that_stay_dense_are_not_pruned_to_be_priced(
    tmp_path: Path, quick: PruneRecipe
) -> None:
    model, watch = save_tiny_model("olmoe", tmp_path / "olmoe"), Watch()
    job = Job(str(model), replace(quick, experts="dense"), progress=watch)
    units = measure_and_report(job, tmp_path / "ranking", held_out=FEW)
    assert set(watch.names) == {name for unit in units for name in unit.operators}
    assert not [name for name in watch.names if ".experts." in name]


def test_the_ranking_alone_is_written_as_json_and_as_a_page_that_needs_no_network(
    llama: Path, tmp_path: Path, quick: PruneRecipe
) -> None:
    units = measure_and_report(Job(str(llama), quick), tmp_path / "ranking", held_out=FEW)
    assert len(units) == 8
    page = (tmp_path / "ranking" / "sensitivity.html").read_text(encoding="utf-8")
    assert "self_attn.q_proj+k_proj+v_proj" in page
    assert 'src="http' not in page
    assert sorted(path.name for path in (tmp_path / "ranking").iterdir()) == [
        "sensitivity.html",
        "sensitivity.json",
    ]
