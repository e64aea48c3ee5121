"""A folder holds the files and tensors that were written to it, or the first fault is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sparseserve.checkpoint.artifact import (
    CARD_FILE,
    MANIFEST_FILE,
    Artifact,
    Manifest,
    write_manifest,
)
from sparseserve.checkpoint.tensors import write_checkpoint
from sparseserve.checkpoint.verification import check_before_reading, verify
from sparseserve.errors import ArtifactError
from sparseserve.testing import tiny_model


@pytest.fixture(params=[10**9, 50_000], ids=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    place = tmp_path / "model"
    tensors = tiny_model("llama").state_dict()
    write_checkpoint(place, tensors.items(), shard_bytes=request.param)
    manifest = Manifest("dense", "2:4", (), (), "tiny", {}, {}, {}, {})
    write_manifest(place, manifest)
    return place


def change(folder: Path, *, drop: str | None = None, add: str | None = None) -> None:
    """Write the file that holds ``drop``, or any, again; an index follows."""
    files = sorted(folder.glob("*.safetensors"))
    file = next(f for f in files if drop is None or drop in load_file(f))
    tensors = load_file(file)
    if add is not None:
        tensors[add] = next(iter(tensors.values())).clone()
    if drop is not None:
        del tensors[drop]
    save_file(tensors, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        kept = {name: place for name, place in data["weight_map"].items() if name != drop}
        data["weight_map"] = {**kept, **({add: file.name} if add else {})}
        index.write_text(json.dumps(data))


def test_what_was_written_passes(folder: Path) -> None:
    check_before_reading(folder, verified=False)
    verify(folder)
    assert set(Artifact.open(folder).manifest.tensors) == set(tiny_model("llama").state_dict())


def test_a_folder_is_finished_again_after_a_death_while_its_manifest_or_card_was_written(
    folder: Path,
) -> None:
    for name in (MANIFEST_FILE, CARD_FILE):
        (folder / f"{name}.tmp").write_text("half of it")
    manifest = write_manifest(folder, Artifact.open(folder).manifest).manifest
    assert not list(folder.glob("*.tmp"))
    assert not [name for name in manifest.files if name.endswith(".tmp")]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    change(folder, drop=name)
    with pytest.raises(ArtifactError, match=rf"tensor {name} is missing \(1 of "):
        check_before_reading(folder, verified=False)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    change(folder, add="model.extra.weight")
    with pytest.raises(ArtifactError, match=r"tensor model\.extra\.weight was added"):
        check_before_reading(folder, verified=False)


def test_a_surplus_file_of_weights_is_named(folder: Path) -> None:
    first = min(folder.glob("*.safetensors"))
    shutil.copy(first, folder / "another.safetensors")
    with pytest.raises(ArtifactError, match=r"another\.safetensors: not listed"):
        check_before_reading(folder, verified=False)


def test_a_file_that_was_cut_is_named(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=file.name):
        check_before_reading(folder, verified=False)


def test_a_manifest_that_counted_no_tensors_vouches_for_the_sizes(folder: Path) -> None:
    manifest = replace(Artifact.open(folder).manifest, tensors=())
    (folder / "sparseserve.json").write_text(json.dumps(manifest.to_json()))
    check_before_reading(folder, verified=False)
    change(folder, drop="model.norm.weight")
    with pytest.raises(ArtifactError, match="bytes instead of"):
        check_before_reading(folder, verified=False)


def test_a_folder_of_others_passes(folder: Path) -> None:
    (folder / "sparseserve.json").unlink()
    change(folder, drop="model.norm.weight")
    check_before_reading(folder, verified=False)


def test_a_manifest_that_was_edited_is_not_believed(folder: Path) -> None:
    path = folder / "sparseserve.json"
    data = json.loads(path.read_text())
    data["tensors"] = data["tensors"][1:]
    path.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="digest differs"):
        check_before_reading(folder, verified=False)
