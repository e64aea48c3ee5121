"""Windows of published evaluations, against the published algorithm written plainly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import PreTrainedTokenizerFast

from sparseserve.cli.evaluate import evaluate_command
from sparseserve.errors import CalibrationError, RecipeError
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.evaluation.protocols import WIKITEXT2, wikitext2_windows
from sparseserve.exporters import export_packed24
from sparseserve.testing import save_tiny_model, tiny_model, tiny_tokenizer
from sparseserve.text import read_text
from tests.unit.evaluation.pruned import marking_tokenizer, save_pruned, words

ROWS = ["", " = Robert Boulter = \n", "", *(f" Line {i} is {i * i} long .\n" for i in range(40))]


def published_perplexity(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: list[str], seqlen: int
) -> float:
    """The evaluation of WikiText-2 as published with SparseGPT, one step after the other."""
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    nsamples = ids.numel() // seqlen
    nlls = []
    for i in range(nsamples):
        batch = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(batch).logits
        loss = nn.CrossEntropyLoss()(logits[0, :-1, :], batch[0, 1:])
        nlls.append(loss.float() * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)))


def rows_file(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), marking_tokenizer()], ids=["plain", "bos"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_perplexity_is_that_of_the_published_algorithm(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    rows = rows_file(tmp_path / "rows.jsonl")
    spec = EvaluationSpec(text=str(rows), sequence_length=100, protocol="wikitext2")
    report = evaluate(str(folder), spec)
    expected = published_perplexity(tiny_model(family), tokenizer, ROWS, 100)
    assert report.perplexity == pytest.approx(expected, rel=1e-6)
    assert report.windows == len(tokenizer("\n\n".join(ROWS))["input_ids"]) // 100 > 5
    assert (report.protocol, report.sequence_length) == ("wikitext2", 100)
    own = evaluate(str(folder), EvaluationSpec(text=str(rows), sequence_length=100))
    marks = tokenizer("")["input_ids"]
    assert (own.perplexity != report.perplexity) == bool(marks)  # ours begins every window


def test_a_mark_stands_at_the_start_of_the_text_only(tmp_path: Path) -> None:
    tokenizer = marking_tokenizer()
    source = read_text(rows_file(tmp_path / "rows.jsonl"))
    windows = wikitext2_windows(tokenizer, source, sequence_length=32)
    marks = (torch.stack(windows) == tokenizer.bos_token_id).nonzero().tolist()
    assert marks == [[0, 0]]
    everything = tokenizer("\n\n".join(ROWS))["input_ids"]
    assert torch.cat(windows).tolist() == everything[: len(windows) * 32]
    some = wikitext2_windows(tokenizer, source, sequence_length=32, samples=2)
    assert [window.tolist() for window in some] == [
        windows[index].tolist() for index in (0, len(windows) // 2)
    ]


def test_a_packed_model_has_the_perplexity_of_its_dense_twin(tmp_path: Path) -> None:
    dense = save_pruned("llama", tmp_path / "dense", words(tmp_path / "c.txt", "to prune "))
    export_packed24(dense, tmp_path / "packed")
    rows = rows_file(tmp_path / "rows.jsonl")
    spec = EvaluationSpec(text=str(rows), sequence_length=64, protocol="wikitext2")
    twins = [evaluate(str(tmp_path / name), spec).perplexity for name in ("dense", "packed")]
    assert twins[0] == twins[1]


def test_the_published_length_is_refused_by_a_model_that_takes_less(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    spec = EvaluationSpec(text=str(rows_file(tmp_path / "rows.jsonl")), protocol="wikitext2")
    with pytest.raises(RecipeError, match=r"2048 tokens .*give --sequence-length 256 or less"):
        evaluate(str(folder), spec)


def test_a_text_of_less_than_a_window_is_refused(tmp_path: Path) -> None:
    source = read_text(rows_file(tmp_path / "rows.jsonl"))
    with pytest.raises(CalibrationError, match=r"0 windows of 2048, 1 are needed"):
        wikitext2_windows(tiny_tokenizer(), source)
    with pytest.raises(CalibrationError, match=r"windows of 100, 99 are needed"):
        wikitext2_windows(tiny_tokenizer(), source, sequence_length=100, samples=99)
    with pytest.raises(RecipeError, match=r"--samples 0 must be at least 1"):
        wikitext2_windows(tiny_tokenizer(), source, sequence_length=100, samples=0)
    with pytest.raises(RecipeError, match=r"--sequence-length 1 must be at least 2"):
        wikitext2_windows(tiny_tokenizer(), source, sequence_length=1)


def test_without_a_text_the_test_split_is_asked_of_the_hub(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(CalibrationError, match=f"text '{WIKITEXT2}' is no file or folder"):
        evaluate(str(folder), EvaluationSpec(protocol="wikitext2", sequence_length=16))


def test_the_command_says_whose_windows_were_measured(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    rows = rows_file(tmp_path / "rows.jsonl")
    options = ["--protocol", "wikitext2", "--text", str(rows), "--sequence-length", "64", "--json"]
    result = CliRunner().invoke(evaluate_command, [str(folder), *options], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert (report["protocol"], report["sequence_length"]) == ("wikitext2", 64)
