"""Results that are given to a page: what may stand beside each other, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparseserve.errors import RecipeError
from sparseserve.page.benches import read_bench
from sparseserve.page.evaluations import Row, Sides, read_evaluations, rows_of

BENCH = Path(__file__).parents[3] / "benchmarks" / "results" / "bench-smollm2-2of4.json"
SIDES = Sides(Path("runs/OUT"), Path("models/DENSE"), "owner/DENSE")

PERPLEXITY = {
    "perplexity": 20.0,
    "tokens": 1022,
    "windows": 2,
    "sequence_length": 512,
    "text": "news.txt",
    "files": [{"name": "news.txt", "sha256": "ab"}],
    "model": "runs/OUT",
    "backend": "transformers",
    "dtype": "float32",
    "seconds": 1.0,
    "verified": False,
}
SCORE = {
    "task": "piqa",
    "version": "1.0",
    "shots": 0,
    "metric": "acc",
    "value": 0.6,
    "standard_error": 0.01,
    "items": 100,
    "items_digest": "cd",
}
SCORES = {"scores": [SCORE], "model": "runs/OUT", "backend": "transformers", "dtype": "float32"}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(data: object) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(data))
        return path

    return run


def perplexity_rows(write: Write, *changes: dict[str, Any]) -> tuple[Row, ...]:
    files = [write({**PERPLEXITY, **change}) for change in changes]
    return rows_of(read_evaluations(files).perplexities, SIDES)


@pytest.mark.parametrize(
    "dense", ["models/DENSE", "owner/DENSE", str(Path("models/DENSE").absolute()), "/else/DENSE"]
)
def test_a_dense_perplexity_stands_beside_the_pruned_one(write: Write, dense: str) -> None:
    [row] = perplexity_rows(write, {}, {"model": dense, "perplexity": 10.0})
    assert row.dense is not None
    assert row.pruned is not None
    assert (row.dense.value, row.pruned.value) == (10.0, 20.0)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"name": "news.txt", "sha256": "cd"}]},
        {"tokens": 511},
        {"sequence_length": 256},
        {"backend": "vllm"},
        {"dtype": "bfloat16"},
        {"protocol": "wikitext2"},
    ],
)
def test_figures_of_other_windows_or_programs_are_not_compared(
    write: Write, change: dict[str, Any]
) -> None:
    rows = perplexity_rows(write, {}, {"model": "models/DENSE", **change})
    assert [(row.dense is None, row.pruned is None) for row in rows] == [
        (True, False),
        (False, True),
    ]


def test_a_model_of_another_name_is_neither(write: Write) -> None:
    [row] = perplexity_rows(write, {}, {"model": "runs/OTHER"})
    assert [other.model for other in row.others] == ["runs/OTHER"]


def test_two_figures_for_one_thing_are_refused_unless_they_are_equal(write: Write) -> None:
    [row] = perplexity_rows(write, {}, {})
    assert row.pruned is not None
    with pytest.raises(RecipeError, match=r"20 and 21 are both given for 'news.txt' of the pruned"):
        perplexity_rows(write, {}, {"perplexity": 21.0})


def test_scores_are_read_with_those_of_the_baseline(write: Write) -> None:
    dense = {**SCORES, "model": "models/DENSE", "scores": [{**SCORE, "value": 0.7}]}
    [row] = rows_of(read_evaluations([write({**SCORES, "baseline": dense})]).scores, SIDES)
    assert row.dense is not None
    assert row.pruned is not None
    assert row.dense.value - row.pruned.value == pytest.approx(0.1)
    assert "100 items, 0 examples" in row.any.details


def test_scores_of_other_items_are_not_compared(write: Write) -> None:
    other = {**SCORES, "model": "models/DENSE", "scores": [{**SCORE, "items_digest": "ef"}]}
    assert len(rows_of(read_evaluations([write(SCORES), write(other)]).scores, SIDES)) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "windows is missing, but must be a whole number"),
        ({**PERPLEXITY, "perplexity": "20"}, "perplexity is '20', but must be a number"),
        ({**PERPLEXITY, "perplexity": float("nan")}, "perplexity is nan, but must be above 0"),
        ({**PERPLEXITY, "perplexity": -1}, "perplexity is -1, but must be above 0"),
        ({**PERPLEXITY, "model": ["x"]}, r"model is \['x'\], but must be a text"),
        ({**PERPLEXITY, "files": [1]}, r"files is \[1\], but must be a list of objects"),
        ({**SCORES, "scores": [{**SCORE, "value": True}]}, r"scores\.0\.value is True"),
        ([], "is not a JSON object"),
    ],
)
def test_what_evaluate_did_not_write_is_refused_in_one_line(
    write: Write, data: object, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        read_evaluations([write(data)])
    assert "\n" not in str(caught.value)


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BENCH.read_text(encoding="utf-8"))
    return found


def test_a_real_bench_is_read_as_it_is() -> None:
    data = committed()
    bench = read_bench(BENCH, data["model"]["weight_bytes"])
    assert [speed.decode for speed in bench.speeds] == [row["decode"] for row in data["speedups"]]
    first = data["baseline"]["latency"][0]
    assert bench.speeds[0].dense.each_token == first["tpot_seconds"]["median"]
    assert bench.pruned.perplexity == data["model"]["perplexity"]
    assert bench.dense.memory_bytes == data["baseline"]["memory"]["weight_bytes"]


def test_a_bench_of_another_checkpoint_is_refused() -> None:
    with pytest.raises(RecipeError, match="this checkpoint has 7: bench this one"):
        read_bench(BENCH, 7)


def test_a_bench_without_a_latency_is_refused(write: Write) -> None:
    data = committed()
    data["baseline"]["latency"].pop()
    with pytest.raises(RecipeError, match="has no latency for"):
        read_bench(write(data), data["model"]["weight_bytes"])
