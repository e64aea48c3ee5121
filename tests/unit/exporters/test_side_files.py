"""What an export writes beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sparseserve.exporters.side_files import model_config


def test_a_new_dtype_is_said_wherever_the_configuration_named_one(tmp_path: Path) -> None:
    text = {"hidden_size": 8, "torch_dtype": "float32"}
    config = {"text_config": text, "vision_config": {"dtype": "float32"}, "rope": {"theta": 1.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_config(tmp_path, torch.bfloat16) == {
        "dtype": "bfloat16",
        "text_config": {"hidden_size": 8, "torch_dtype": "bfloat16"},
        "vision_config": {"dtype": "bfloat16"},
        "rope": {"theta": 1.0},
    }
    assert model_config(tmp_path) == config
