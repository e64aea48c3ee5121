"""Tiny pruned checkpoints, tokenizers and texts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast

from sparseserve.checkpoint.artifact import Artifact, Manifest, write_manifest
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model, tiny_tokenizer
from sparseserve.text.calibration import CalibrationSpec, load_calibration


def save_pruned(family: str, folder: Path, calibration_text: Path) -> Artifact:
    """A 2:4 checkpoint made by plain projection, with a manifest that names its calibration."""
    model = tiny_model(family)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            module.weight.data = TWO_FOUR.project(module.weight.data)
            names.append(name)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    spec = CalibrationSpec(source=str(calibration_text), samples=2, sequence_length=8)
    record = load_calibration(spec, tiny_tokenizer(), max_length=None).record
    manifest = Manifest(
        format="dense",
        pattern="2:4",
        pruned=tuple(names),
        transposed=(),
        source=family,
        recipe={},
        calibration=asdict(record),
        report={},
        files={},
    )
    return write_manifest(folder, manifest)


def words(path: Path, text: str) -> Path:
    path.write_text(text * 20)
    return path


def marking_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a mark, as Llama's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer
