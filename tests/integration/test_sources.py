"""What the main job makes of sources that are more, or less, than plain dense weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan
from tests.integration.quantised_folders import save_fp8, save_mxfp4
from tests.selection import representatives

Prune = Callable[..., Artifact]
FP8_FAMILIES = representatives(
    ("llama", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3"), ("llama", "qwen3_moe")
)


def same_checkpoints(one: Artifact, other: Artifact) -> bool:
    tensors = [dict(artifact.checkpoint.tensors()) for artifact in (one, other)]
    same_names = tensors[0].keys() == tensors[1].keys()
    return same_names and all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


@pytest.mark.parametrize("family", FP8_FAMILIES)
def test_an_fp8_source_gives_the_checkpoint_that_its_dense_weights_give(
    prune: Prune, tmp_path: Path, family: str
) -> None:
    save_fp8(family, tmp_path / "fp8", tmp_path / "plain")
    found = prune(tmp_path / "fp8", "from-fp8", export_format="dense")
    assert same_checkpoints(found, prune(tmp_path / "plain", "from-plain", export_format="dense"))
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())
    verify(found.path)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_mxfp4_source_gives_the_checkpoint_that_its_dense_weights_give(
    prune: Prune, tmp_path: Path, quick: PruneRecipe, dtype: str
) -> None:
    save_mxfp4(tmp_path / "mxfp4", tmp_path / "plain")
    recipe = replace(quick, dtype=dtype)
    found, plain = (
        prune(tmp_path / name, f"from-{name}", recipe=recipe, export_format="dense")
        for name in ("mxfp4", "plain")
    )
    assert same_checkpoints(found, plain)
    kinds = {tensor.dtype for _, tensor in found.checkpoint.tensors()}
    assert kinds == {torch.bfloat16 if dtype == "auto" else torch.float32}


@pytest.mark.parametrize("export_format", ["dense", "packed24"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_the_class_does_not_load_are_copied(
    prune: Prune, tmp_path: Path, export_format: str, shards: int
) -> None:
    source = save_tiny_model("deepseek_v3", tmp_path / "model", dtype=torch.bfloat16)
    if shards > 1:
        model = AutoModelForCausalLM.from_pretrained(source)
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="100KB")
    own = Checkpoint.open(source)
    extra = {
        "model.layers.61.eh_proj.weight": torch.randn(64, 128).to(torch.bfloat16),
        "model.layers.61.self_attn.q_a_proj.weight": torch.randn(32, 64).to(torch.bfloat16),
    }
    with_extra(source, extra)
    found = prune(source, export_format=export_format)
    for name, tensor in extra.items():
        assert found.checkpoint.tensor(name).equal(tensor)
    if export_format == "dense":
        assert found.checkpoint.files.keys() == {*own.files, *extra}
    verify(found.path)
    AutoModelForCausalLM.from_pretrained(found.path)


def test_an_index_that_does_not_name_them_is_refused_before_anything_is_pruned(
    prune: Prune, tmp_path: Path, quick: PruneRecipe
) -> None:
    source = save_tiny_model("deepseek_v3", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    index = (source / "model.safetensors.index.json").read_text()
    name = "model.layers.61.eh_proj.weight"
    with_extra(source, {name: torch.ones(64, 128)})
    (source / "model.safetensors.index.json").write_text(index)

    class Unheard(PruneProgress):
        def layer_started(self, name: str, number: int, total: int) -> None:
            raise AssertionError(name)

    told = f"names no file for '{name}', which lies in model-00001-of-.*: download"
    with pytest.raises(ArtifactError, match=told):
        plan(Job(str(source), quick))
    with pytest.raises(ArtifactError, match=told):
        prune(source, progress=Unheard())


def test_of_a_quantised_source_they_are_left_out_and_that_is_said(
    prune: Prune, tmp_path: Path
) -> None:
    save_fp8("deepseek_v3", tmp_path / "fp8", tmp_path / "plain")
    name = "model.layers.61.eh_proj.weight"
    with_extra(tmp_path / "fp8", {name: torch.ones(64, 64).to(torch.float8_e4m3fn)})
    stages: list[str] = []

    class Listener(PruneProgress):
        def stage(self, text: str) -> None:
            stages.append(text)

    found = prune(tmp_path / "fp8", progress=Listener())
    assert name not in found.checkpoint
    assert f"leaving out 1 quantised tensors, such as {name}" in stages


def with_extra(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    """Put ``extra`` into the first file of a checkpoint, and into its index."""
    first = min(folder.glob("*.safetensors"))
    save_file({**load_file(first), **extra}, first, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        read = json.loads(index.read_text())
        read["weight_map"] |= dict.fromkeys(extra, first.name)
        index.write_text(json.dumps(read))


def test_names_that_only_look_like_unread_ones_are_not_copied_twice(
    prune: Prune, tmp_path: Path
) -> None:
    # The class of GPT-2 leaves out whatever "attn.bias" is found in, and reads attn.c_attn.bias.
    found = prune("gpt2", export_format="dense")
    assert found.checkpoint.files.keys() == Checkpoint.open(tmp_path / "model-gpt2").files.keys()
