"""A model is written layer by layer as transformers writes it whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sparseserve.checkpoint.tensors import Checkpoint, write_checkpoint
from sparseserve.models.saving import stored_tensors
from sparseserve.testing import (
    EXPERT_TINY_FAMILIES,
    HANDING_TINY_FAMILIES,
    MORE_TINY_FAMILIES,
    TINY_FAMILIES,
    save_tiny_model,
    tiny_model,
)

FAMILIES = (
    *TINY_FAMILIES,
    *MORE_TINY_FAMILIES,
    *HANDING_TINY_FAMILIES,
    *EXPERT_TINY_FAMILIES,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_that_save_pretrained_writes(tmp_path: Path, family: str) -> None:
    save_tiny_model(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "whole")
    written = dict(Checkpoint.open(tmp_path / "whole").tensors())
    write_checkpoint(tmp_path / "streamed", stored_tensors(model))
    found = dict(Checkpoint.open(tmp_path / "streamed").tensors())
    assert found.keys() == written.keys()
    assert all(found[name].equal(written[name]) for name in written)
    assert all(found[name].dtype == written[name].dtype for name in written)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_rows_have_the_same_names(family: str, tmp_path: Path) -> None:
    save_tiny_model(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = dict(stored_tensors(model, first_rows=True))
    # Of experts that are one tensor in memory, only the first is there.
    assert rows.keys() <= dict(stored_tensors(model)).keys()
    assert all(
        len(row) == 1 for name, row in rows.items() if row.ndim == 2 and "expert" not in name
    )


@pytest.mark.parametrize("family", EXPERT_TINY_FAMILIES)
def test_of_an_expert_first_rows_hold_no_more_than_the_first_inputs(family: str) -> None:
    model = tiny_model(family)
    whole = dict(stored_tensors(model))
    rows = {
        name: row
        for name, row in stored_tensors(model, first_rows=True)
        if ".experts." in name and row.shape != whole[name].shape and "bias" not in name
    }
    inputs = min(model.config.hidden_size, model.config.intermediate_size)
    assert rows
    assert all(row.numel() <= whole[name].numel() * 2 // inputs for name, row in rows.items())
