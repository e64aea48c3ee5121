"""The variants of the published recipe are what their names say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks.research import paper_ablation
from benchmarks.research.operator_data import small_operator
from benchmarks.research.tables import paper_ablation_table
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.fista_paper import PaperFista
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.solvers.statistics import InputStatistics, output_error
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import save_tiny_model

pytestmark = pytest.mark.research


def corrected() -> tuple[Tensor, InputStatistics]:
    """Return an operator whose pruned inputs differ from the dense ones."""
    operator = small_operator()
    inputs = operator.inputs
    noisy = inputs + 0.1 * inputs.std() * torch.randn(
        inputs.shape, generator=torch.Generator().manual_seed(0)
    )
    statistics = InputStatistics.of(noisy, inputs)
    return operator.weight, statistics


def test_without_correction_the_pruned_inputs_play_no_part() -> None:
    weight, statistics = corrected()
    dense = statistics.dense_gram
    alone = InputStatistics(dense, dense, dense, statistics.tokens)
    expected = SparseGPT().prune(weight, alone, TWO_FOUR).weight
    found = paper_ablation.Uncorrected(SparseGPT()).prune(weight, statistics, TWO_FOUR).weight
    assert torch.equal(found, expected)


def test_damping_the_statistics_is_damping_the_problem() -> None:
    weight, statistics = corrected()
    # ADMM's own damping has to be positive; so little of it changes nothing.
    found = paper_ablation.Damped(Admm(damping=1e-9)).prune(weight, statistics, TWO_FOUR).weight
    expected = Admm(damping=paper_ablation.DAMPING).prune(weight, statistics, TWO_FOUR).weight
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def test_wanda_does_not_mind_the_scale_of_columns() -> None:
    weight, statistics = corrected()
    found = paper_ablation.ScaledColumns(Wanda()).prune(weight, statistics, TWO_FOUR).weight
    expected = Wanda().prune(weight, statistics, TWO_FOUR).weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "variant",
    [
        paper_ablation.RelativeLambda(PaperFista()),
        paper_ablation.ThenRefit(PaperFista()),
        paper_ablation.ScaledColumns(PaperFista()),
    ],
    ids=lambda variant: type(variant).__name__,
)
def test_no_repair_ends_worse_than_the_start_of_the_search(variant: paper_ablation.Method) -> None:
    weight, statistics = corrected()
    found = variant.prune(weight, statistics, TWO_FOUR).weight
    assert TWO_FOUR.first_violation(found) is None
    start = Wanda().prune(weight, statistics, TWO_FOUR).weight
    error, before = (float(output_error(each, weight, statistics).sum()) for each in (found, start))
    assert error < before


def test_a_smoke_run_prunes_the_layers_it_is_told_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    monkeypatch.setattr(paper_ablation, "RESULT", tmp_path / "result.json")
    arguments = [str(model), "--layer", "1", "--samples", "2", "--sequence-length", "16"]
    run = CliRunner().invoke(
        paper_ablation.main,
        [*arguments, "--windows", "1", "--text", "speeches=packaged", "--only", "admm", "--smoke"],
        catch_exceptions=False,
    )
    (row,) = (json.loads(line) for line in run.output.splitlines() if line.startswith("{"))
    assert row["method"] == "admm"
    assert row["gram_products"] > 0
    assert row["perplexity"]["speeches"] > 1
    assert not (tmp_path / "result.json").exists()


def test_the_table_has_the_share_of_the_gap_that_is_left() -> None:
    def row(method: str, perplexity: float, commit: str) -> dict[str, object]:
        return {
            "method": method,
            "perplexity": {"speeches": perplexity},
            "seconds": 1.0,
            "gram_products": 2000,
            "commit": commit,
        }

    machine = {"cpu": "a processor", "torch": "2", "date": "2026-01-01"}
    setting = {
        "model": "a/model",
        "layers": [1, 2],
        "calibration": {"samples": 2, "length": 16},
        "texts": {"speeches": None},
        "evaluation_windows": 1,
    }
    rows = [
        row("dense", 1.0, "abc"),
        row("sparsegpt, no correction", 4.0, "abc"),
        row("paper", 2.0, "def"),
    ]
    shown = paper_ablation_table({"machine": machine, "setting": setting, "rows": rows})
    assert "| paper | 0.50 | 2,000 | 1 |" in shown.splitlines()
    assert "decoder layers 1 and 2" in shown
    assert "commits abc, def," in shown
