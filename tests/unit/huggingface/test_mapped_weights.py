"""Weights that transformers had to convert are kept in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from sparseserve.errors import ArtifactError
from sparseserve.huggingface import mapped_weights
from sparseserve.huggingface.opening import open_weights

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 512},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_weights, "_SMALLEST_BYTES", 4096)


def file_behind(tensor: Tensor) -> str | None:
    """The file that a tensor's memory belongs to, as the system shows it; None for no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode, *name = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return name[0] if inode != "0" else None
    raise AssertionError("not mapped at all")


def loaded(folder: Path, scratch: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    with mapped_weights.mapped_weights(scratch):
        return open_weights(folder, dtype).model


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_converted_weights_are_in_files_without_names_and_others_where_they_were(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    scratch.mkdir()
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    model.to(torch.bfloat16).save_pretrained(folder)
    found = loaded(folder, scratch, dtype)
    plain = dict(open_weights(folder, dtype).model.named_parameters())
    for name, parameter in found.named_parameters():
        assert parameter.equal(plain[name])
        if parameter.nbytes < 4096:
            continue
        file = file_behind(parameter)
        assert file is not None
        converted = dtype is not None or "experts" in name
        assert file.startswith(str(scratch if converted else folder))
        assert converted == file.endswith("(deleted)")
    assert list(scratch.iterdir()) == []


def test_what_is_written_into_a_mapped_weight_stays_there(tmp_path: Path) -> None:
    mapped = mapped_weights.in_file(torch.zeros(64, 64), tmp_path)
    mapped.add_(1)
    assert file_behind(mapped) is not None
    assert mapped.equal(torch.ones(64, 64))


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path)
    model = loaded(tmp_path, tmp_path, torch.bfloat16)
    head = model.get_parameter("lm_head.weight")
    assert head is model.get_parameter("model.embed_tokens.weight")
    assert file_behind(head) is not None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    with pytest.raises(ArtifactError, match="nowhere: cannot be written"):
        loaded(tmp_path / "model", tmp_path / "nowhere", torch.bfloat16)


def test_nothing_is_left_changed(tmp_path: Path) -> None:
    before = dict(os.environ)
    with mapped_weights.mapped_weights(tmp_path):
        pass
    assert dict(os.environ) == before
    assert file_behind(torch.nn.Linear(64, 64).weight) is None
