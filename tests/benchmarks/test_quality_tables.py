"""Tables of perplexities gather what belongs together, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import tables as quality_tables
from benchmarks.quality.compare import Setting, default_variant
from sparseserve.checkpoint.tensors import write_json

SETTING = Setting(
    model="models/m",
    pattern="2:4",
    calibration="texts/c.txt",
    samples=8,
    sequence_length=512,
    evaluation_windows=3,
    evaluation_length=64,
    texts={"news": "n.txt"},
)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    return tmp_path


def result(setting: Setting, **perplexities: tuple[float, ...]) -> dict[str, Any]:
    """Return a result with one run a seed for each variant; ``admm_none`` stands for admm:none."""
    runs = [
        {
            "variant": variant.replace("_", ":"),
            "seed": seed,
            "perplexity": {"news": value},
            "commit": f"c{setting.samples}",
        }
        for variant, values in perplexities.items()
        for seed, value in enumerate(values)
    ]
    machine = {"torch": "2", "date": f"2026-01-0{setting.samples % 9}"}
    return {"setting": asdict(setting), "machine": machine, "runs": runs}


def rows(table: str) -> list[str]:
    return [line for line in table.splitlines()[2:] if line.startswith("|")]


def test_sizes_stand_in_order_with_the_variants_of_the_first(results: Path) -> None:
    first = result(SETTING, dense=(10.0,), admm_none=(20.0,))
    larger = replace(SETTING, samples=16)
    write_json(results / "quality-a.json", first)
    write_json(results / "quality-0.json", result(larger, dense=(10.0,), admm_none=(15.0,)))
    table = quality_tables.sizes_table(first)
    assert rows(table) == [
        "|  | dense |  | 10.00 |",
        "| 4,096 | admm | none | 20.00 |",
        "| 8,192 | admm | none | 15.00 |",
    ]
    assert "commits c8, c16, 2026-01-08" in table


def test_another_model_or_variant_stays_out(results: Path) -> None:
    first = result(SETTING, admm_none=(20.0,))
    write_json(results / "quality-a.json", first)
    other = replace(SETTING, samples=16, model="models/other")
    write_json(results / "quality-b.json", result(other, admm_none=(15.0,)))
    write_json(results / "quality-c.json", result(replace(SETTING, samples=32), admm_intra=(12.0,)))
    assert rows(quality_tables.sizes_table(first)) == ["| 4,096 | admm | none | 20.00 |"]


def test_sizes_are_compared_on_the_first_seed(results: Path) -> None:
    first = result(SETTING, admm_none=(20.0, 40.0))
    write_json(results / "quality-a.json", first)
    assert rows(quality_tables.sizes_table(first)) == ["| 4,096 | admm | none | 20.00 |"]


def test_patterns_stand_in_order_of_what_is_pruned(results: Path) -> None:
    half = result(replace(SETTING, pattern="3:4"), admm_none=(30.0,))
    tenth = result(replace(SETTING, pattern="5%"), admm_none=(11.0,))
    write_json(results / "quality-a.json", half)
    write_json(results / "quality-b.json", tenth)
    assert rows(quality_tables.patterns_table(tenth)) == [
        "| 5% | admm | none | 11.00 |",
        "| 3:4 | admm | none | 30.00 |",
    ]


def test_seeds_are_a_mean_with_a_range() -> None:
    table = quality_tables.quality_table(result(SETTING, admm_none=(20.0, 40.0)))
    assert rows(table) == ["| admm | none | 30.00 (20.00 to 40.00) |"]
    assert "4,096 calibration tokens of `c.txt`, 2 calibration seeds" in table


def test_steps_and_weights_are_written_out() -> None:
    variant = "fista-paper[warm_start=admm]:intra+inter@0.25,reconstruct@6,scramble"
    assert quality_tables.label(variant) == (
        "fista-paper, error correction intra+inter, weight 0.25, warm start admm, "
        "scrambled windows, then reconstruct (6 epochs)"
    )


def test_the_recipe_best_is_named_with_its_further_windows() -> None:
    variant = f"{default_variant()},rotate,distill@96"
    assert quality_tables.label(variant) == "the recipe best, with 96 further windows"


def test_rotations_come_before_and_distillation_after_with_its_windows() -> None:
    assert quality_tables.label("admm:intra,distill@96,rotate") == (
        "admm, error correction intra, rotated heads, then distill (96 further windows)"
    )
