"""Codes of 8 bits that another tool wrote stay codes where packed24 can hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseserve.checkpoint.verification import verify
from sparseserve.exporters import load_dense_state
from sparseserve.workflow.convert import convert

SOURCE = Path(__file__).parents[1] / "data" / "foreign" / "bitmask-int8"
ROUNDED_INPUTS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


def foreign(
    folder: Path,
    inputs: object = ROUNDED_INPUTS,
    change: Callable[[Tensors], object] = lambda tensors: None,
) -> Path:
    """Copy the fixture, say what is done to inputs, and ``change`` its tensors."""
    shutil.copytree(SOURCE, folder)
    config = json.loads((folder / "config.json").read_text())
    groups = {"group_0": {"targets": ["Linear"], "input_activations": inputs}}
    config["quantization_config"]["config_groups"] = groups
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def kind_of(folder: Path) -> str:
    weights = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"]
    return f"{weights['type']}{weights['bits']}" if weights["type"] != "float" else "float"


def to_fp8(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".compressed")]:
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)


def one_scale(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].flatten()[:1].clone()


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda tensors: None, "int8"), (to_fp8, "fp88"), (one_scale, "int8")],
    ids=["int8", "fp8", "one scale for a weight"],
)
def test_codes_are_kept_bit_for_bit(
    tmp_path: Path, change: Callable[[Tensors], object], kind: str
) -> None:
    source = foreign(tmp_path / "source", change=change)
    kept = convert(str(source), tmp_path / "kept")
    verify(kept.path)
    assert kind_of(kept.path) == kind
    plain = load_dense_state(convert(str(source), tmp_path / "plain", "dense").path)
    found = load_dense_state(kept.path)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def one_code_too_low(tensors: Tensors) -> None:
    tensors[f"{Q}.compressed"][3, 2] = -128


def no_scale(tensors: Tensors) -> None:
    tensors[f"{Q}.weight_scale"][1] = 0


@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        (None, lambda tensors: None),
        ({**ROUNDED_INPUTS, "num_bits": 16}, lambda tensors: None),
        (ROUNDED_INPUTS, one_code_too_low),
        (ROUNDED_INPUTS, no_scale),
    ],
    ids=["exact inputs", "inputs of 16 bits", "a code of -128", "a scale of zero"],
)
def test_codes_that_packed24_cannot_hold_become_floats(
    tmp_path: Path, inputs: object, change: Callable[[Tensors], object]
) -> None:
    converted = convert(str(foreign(tmp_path / "source", inputs, change)), tmp_path / "out")
    verify(converted.path)
    assert kind_of(converted.path) == "float"


def test_a_dtype_that_is_asked_for_keeps_no_codes(tmp_path: Path) -> None:
    source = foreign(tmp_path / "source")
    converted = convert(str(source), tmp_path / "out", dtype=torch.bfloat16)
    assert kind_of(converted.path) == "float"
