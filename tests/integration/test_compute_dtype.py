"""The dtype of products is a choice of the run, which says it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from sparseserve.testing import save_tiny_model
from tests.integration.command_line import Cli, prune_arguments, refusal


def test_the_manifest_and_the_card_say_what_products_were_computed_in(
    cli: Cli, tmp_path: Path, text: Path
) -> None:
    model = save_tiny_model("llama", tmp_path / "m")
    weights = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        done = cli(
            *prune_arguments(model, text, "-o", out, "--reconstruct", "1"), "--compute-dtype", dtype
        )
        assert done.returncode == 0, done.stderr
        manifest = json.loads((out / "sparseserve.json").read_text())
        assert manifest["recipe"]["compute_dtype"] == dtype
        assert manifest["report"]["compute_dtype"] == dtype
        assert f"computed in {dtype}" in (out / "README.md").read_text()
        weights.append(load_file(out / "model.safetensors"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not weights[0][name].equal(weights[1][name]), "the choice has an effect"


def test_another_dtype_is_refused(cli: Cli, tmp_path: Path, text: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "m")
    unknown = cli(
        *prune_arguments(model, text, "-o", tmp_path / "out"), "--compute-dtype", "float16"
    )
    assert "unknown compute_dtype 'float16'" in refusal(unknown)
