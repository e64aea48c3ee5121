"""Scores on tasks are those of lm-eval itself, and differences are told from chance."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from sparseserve.cli.evaluate import evaluate_command
from sparseserve.cli.tasks import score_table
from sparseserve.errors import MissingExtraError, RecipeError
from sparseserve.evaluation import task_data
from sparseserve.evaluation.task_comparison import compare_scores
from sparseserve.evaluation.tasks import (
    TaskReport,
    TaskSpec,
    evaluate_tasks,
)
from sparseserve.exporters import export_packed24
from sparseserve.testing import save_tiny_model
from tests.unit.evaluation.own_lm_eval import lm_evals_own
from tests.unit.evaluation.pruned import save_pruned, words

pytest.importorskip("lm_eval")
# Raised inside lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")

ITEMS = 24


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Look once for all definitions, and leave out lm-eval's list of installed packages."""
    import lm_eval.evaluator

    names = ("piqa", "openbookqa", "boolq", "sciq")
    found = task_data._find(names, task_data._package_folder() / "tasks")
    assert set(found) == set(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            task_data, "_find", lambda names, _: {n: found[n] for n in names if n in found}
        )
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets with the columns of the hub's: one a file, one in splits, one as Parquet."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    piqa = [
        {
            "goal": f"to count {i}",
            "sol1": f"say {chance.random()}",
            "sol2": f"say {chance.random()}",
            "label": chance.randint(0, 1),
        }
        for i in range(ITEMS)
    ]
    lines(folder / "piqa.jsonl", piqa)
    boolq = [
        {"passage": f"{i} is a number.", "question": f"is {i} even", "label": 1 - i % 2}
        for i in range(ITEMS)
    ]
    (folder / "boolq").mkdir()
    (folder / "boolq" / "validation.json").write_text(json.dumps(boolq))
    openbookqa = [
        {
            "question_stem": f"What is {i}?",
            "choices": {"text": [f"{chance.random():.9f}" for _ in "ABCD"], "label": list("ABCD")},
            "answerKey": "ABCD"[chance.randrange(4)],
        }
        for i in range(ITEMS)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(openbookqa), folder / "openbookqa.parquet")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    dense = save_pruned("llama", folder / "pruned", words(folder / "c.txt", "to prune "))
    export_packed24(dense, folder / "packed")
    save_tiny_model("llama", folder / "dense")
    return {name: folder / name for name in ("dense", "pruned", "packed")}


@pytest.fixture(scope="module")
def reports(models: dict[str, Path], data: Path) -> dict[str, TaskReport]:
    spec = TaskSpec(tasks=("piqa", "openbookqa", "boolq"), folder=data, batch_size=5)
    return {name: evaluate_tasks(str(models[name]), spec) for name in ("dense", "packed")}


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_scores_are_those_of_lm_eval_itself(
    form: str,
    models: dict[str, Path],
    data: Path,
    reports: dict[str, TaskReport],
    tmp_path: Path,
) -> None:
    expected = lm_evals_own(models[form], data, tmp_path)
    scores = reports[form].scores
    assert {(score.task, score.metric) for score in scores} == {
        *(("piqa", metric) for metric in ("acc", "acc_norm")),
        *(("openbookqa", metric) for metric in ("acc", "acc_norm")),
        ("boolq", "acc"),
    }
    for score in scores:
        own = expected[f"own_{score.task}"]
        assert score.value == own[f"{score.metric},none"], score
        assert score.standard_error == own[f"{score.metric}_stderr,none"], score
        assert (score.items, score.shots) == (ITEMS, 0)
        assert sum(score.values) / ITEMS == pytest.approx(score.value)
    assert len({score.value for score in scores}) > 1


def test_a_packed_checkpoint_scores_as_its_dense_twin(
    models: dict[str, Path], data: Path, reports: dict[str, TaskReport]
) -> None:
    spec = TaskSpec(tasks=("piqa", "openbookqa", "boolq"), folder=data, batch_size=5)
    twin = evaluate_tasks(str(models["pruned"]), spec)
    assert twin.scores == reports["packed"].scores
    assert [score.values for score in twin.scores] != [
        score.values for score in reports["dense"].scores
    ]


def test_the_report_names_the_data_by_its_hash(reports: dict[str, TaskReport], data: Path) -> None:
    expected = {
        name: hashlib.sha256((data / name).read_bytes()).hexdigest()
        for name in ("piqa.jsonl", "openbookqa.parquet", "boolq/validation.json")
    }
    assert {file.name: file.sha256 for file in reports["dense"].files} == expected


def test_a_difference_has_the_error_of_the_changes_item_by_item(
    reports: dict[str, TaskReport],
) -> None:
    dense, pruned = reports["dense"], reports["packed"]
    for before, after, found in zip(
        dense.scores, pruned.scores, compare_scores(dense.scores, pruned.scores), strict=True
    ):
        changes = np.array(after.values) - np.array(before.values)
        assert found.paired
        assert found.difference == pytest.approx(changes.mean())
        assert found.standard_error == pytest.approx(changes.std(ddof=1) / math.sqrt(ITEMS))


def test_rows_without_the_columns_of_the_task_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    lines(tmp_path / "piqa.jsonl", [{"question": "How?", "answer": "So."}])
    with pytest.raises(RecipeError, match=r"the rows of piqa do not fit .*'goal' is undefined"):
        evaluate_tasks(str(models["dense"]), TaskSpec(tasks=("piqa",), folder=tmp_path))


def test_a_task_without_local_data_is_refused_and_not_downloaded(
    models: dict[str, Path], data: Path
) -> None:
    spec = TaskSpec(tasks=("piqa", "sciq"), folder=data)
    with pytest.raises(RecipeError, match=r"holds no sciq\.jsonl, .* that the data set "):
        evaluate_tasks(str(models["dense"]), spec)
    with pytest.raises(RecipeError, match=r"'mmlu' is no single task"):
        evaluate_tasks(str(models["dense"]), replace(spec, tasks=("mmlu",)))


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_remedy(models: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"--tasks piqa: the data cannot be .*--tasks-from"):
        evaluate_tasks(str(models["dense"]), TaskSpec(tasks=("piqa",)))


@pytest.mark.further  # the index of all of lm-eval's tasks takes half a minute
def test_an_unknown_task_is_refused_with_a_near_one(models: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"no task 'piqaa': did you mean 'piqa'"):
        evaluate_tasks(str(models["dense"]), TaskSpec(tasks=("piqaa",)))


def test_a_missing_lm_eval_is_told_with_its_command(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_data, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparseserve\[eval\]'"):
        evaluate_tasks(str(models["dense"]), TaskSpec(tasks=("piqa",)))


def test_the_command_compares_with_the_dense_model(
    models: dict[str, Path], data: Path, reports: dict[str, TaskReport]
) -> None:
    options = ["--tasks", "piqa,openbookqa,boolq", "--tasks-from", str(data), "--batch-size", "5"]
    options += ["--baseline", str(models["dense"])]
    call = [str(models["packed"]), *options, "--json"]
    printed = json.loads(CliRunner().invoke(evaluate_command, call, catch_exceptions=False).stdout)
    expected = compare_scores(reports["dense"].scores, reports["packed"].scores)
    assert [each["difference"] for each in printed["differences"]] == [
        each.difference for each in expected
    ]
    assert [each["value"] for each in printed["baseline"]["scores"]] == [
        score.value for score in reports["dense"].scores
    ]
    assert "values" not in printed["scores"][0]


def test_the_table_has_a_line_for_each_score(reports: dict[str, TaskReport]) -> None:
    dense, packed = reports["dense"], reports["packed"]
    text = rendered(score_table(packed, compare_scores(dense.scores, packed.scores)))
    for score in packed.scores:
        assert f"{score.value:.4f} ± {score.standard_error:.4f}" in text
    assert text.count("│ no") + text.count("yes │") + text.count("no │") >= len(packed.scores)
    assert "difference" not in rendered(score_table(packed, ()))


def rendered(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_limit_takes_the_first_items(
    models: dict[str, Path], data: Path, reports: dict[str, TaskReport]
) -> None:
    spec = TaskSpec(tasks=("piqa",), folder=data, limit=7, batch_size=5)
    for few, all_items in zip(
        evaluate_tasks(str(models["dense"]), spec).scores, reports["dense"].scores, strict=False
    ):
        assert few.items == 7
        assert few.values == all_items.values[:7]


@pytest.mark.further
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_vllm_scores_the_packed_checkpoint_as_transformers_does(
    models: dict[str, Path], data: Path, reports: dict[str, TaskReport]
) -> None:
    pytest.importorskip("vllm")
    spec = TaskSpec(tasks=("piqa", "openbookqa", "boolq"), folder=data, backend="vllm")
    found = evaluate_tasks(str(models["packed"]), spec)
    assert found.backend == "vllm"
    assert found.scores == reports["packed"].scores


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks-from", "."], "--tasks-from needs --tasks"),
        (["--limit", "3"], "--limit needs --tasks"),
        (["--tasks", "piqa", "--text", "a.txt"], "--text does not go with --tasks"),
        (["--tasks", "piqa", "--samples", "3"], "--samples does not go with --tasks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], reason: str) -> None:
    result = CliRunner().invoke(evaluate_command, ["MODEL", *options])
    assert result.exit_code == 2
    assert reason in result.stderr


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(RecipeError, match="--limit 0 must be at least 1"):
        TaskSpec(tasks=("piqa",), limit=0)
    with pytest.raises(RecipeError, match="--batch-size 0 must be at least 1"):
        TaskSpec(tasks=("piqa",), batch_size=0)
