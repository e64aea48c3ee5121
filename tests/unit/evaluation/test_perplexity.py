"""Perplexity against the models' own losses, of checkpoints of each format."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sparseserve.cli.evaluate import evaluate_command
from sparseserve.errors import ArtifactError, NumericalError, RecipeError
from sparseserve.evaluation import perplexity as evaluation
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate, load_for_evaluation
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.exporters import export_packed24
from sparseserve.report import PerplexityResult
from sparseserve.testing import save_tiny_model, tiny_model
from sparseserve.text import read_text
from tests.unit.evaluation.pruned import save_pruned, words


def some_windows(count: int = 3, length: int = 33) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator) for _ in range(count)]


def test_perplexity_is_the_exponential_of_the_models_own_mean_loss() -> None:
    model = tiny_model("llama")
    windows = some_windows()
    losses = [
        model(input_ids=window[None], labels=window[None]).loss.double() for window in windows
    ]
    result = perplexity(model, windows)
    assert result.tokens == 3 * 32
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, some_windows()).perplexity == pytest.approx(model.config.vocab_size)


def test_slicing_the_logits_does_not_change_the_perplexity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = perplexity(tiny_model("llama"), some_windows())
    monkeypatch.setattr(evaluation, "LOGIT_ROWS", 5)
    sliced = perplexity(tiny_model("llama"), some_windows())
    assert sliced.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_the_log_softmax_is_in_float32_for_a_half_precision_model() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    (window,) = some_windows(1)
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1].double()
    likelihood = logits.log_softmax(-1).gather(1, window[1:, None]).mean()
    expected = math.exp(-float(likelihood))
    assert perplexity(model, [window]).perplexity == pytest.approx(expected, rel=1e-5)


def test_a_model_that_is_not_finite_is_refused_with_the_window() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError, match="window 0: negative log-likelihood is nan"):
        perplexity(model, some_windows())


@pytest.mark.parametrize("total", [math.nan, math.inf, 1e6])
def test_a_likelihood_without_a_perplexity_is_refused(total: float) -> None:
    with pytest.raises(NumericalError, match="no perplexity"):
        PerplexityResult.from_negative_log_likelihood(total, 10)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_a_packed_checkpoint_is_evaluated_as_its_dense_twin(tmp_path: Path, family: str) -> None:
    dense = save_pruned(family, tmp_path / "dense", words(tmp_path / "c.txt", "to prune "))
    export_packed24(dense, tmp_path / "packed")
    expected = load_for_evaluation(tmp_path / "dense", torch.float32)
    found = load_for_evaluation(tmp_path / "packed", torch.float32)
    assert not hasattr(found.config, "quantization_config")
    for name, weight in expected.state_dict().items():
        assert weight.equal(found.state_dict()[name]), name
    spec = EvaluationSpec(samples=3, sequence_length=32)
    twins = [evaluate(str(tmp_path / name), spec) for name in ("dense", "packed")]
    assert twins[0].perplexity == twins[1].perplexity


def test_windows_longer_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"--sequence-length 512 .* at most 256"):
        evaluate(str(model), EvaluationSpec(sequence_length=512))


def test_a_damaged_packed_checkpoint_is_refused(tmp_path: Path) -> None:
    dense = save_pruned("llama", tmp_path / "dense", words(tmp_path / "c.txt", "to prune "))
    packed = export_packed24(dense, tmp_path / "packed")
    shard = next(packed.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=shard.name):
        evaluate(str(packed.path), EvaluationSpec(samples=1, sequence_length=32))


def test_the_command_prints_one_json_object_and_progress_elsewhere(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    text = words(tmp_path / "text.txt", "the quick brown fox ")
    options = ["--text", str(text), "--samples", "4", "--sequence-length", "16", "--json"]
    result = CliRunner().invoke(evaluate_command, [str(model), *options], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert "evaluating" in result.stderr
    assert report["tokens"] == 4 * 15
    assert (report["windows"], report["sequence_length"]) == (4, 16)
    assert (report["backend"], report["dtype"], report["text"]) == (
        "transformers",
        "float32",
        "text.txt",
    )
    assert report["files"] == [asdict(file) for file in read_text(text).files]
    direct = evaluate(str(model), EvaluationSpec(text=str(text), samples=4, sequence_length=16))
    assert report["perplexity"] == direct.perplexity
