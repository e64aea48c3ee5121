"""Shards: what is written comes back, and damage is named."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparseserve.checkpoint.tensors import (
    Checkpoint,
    require_space,
    save_tensors,
    write_checkpoint,
    write_json,
)
from sparseserve.errors import ArtifactError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let every file of this process hold at most ``limit`` bytes, as a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@given(shard_bytes=st.integers(1, 100))
def test_tensors_come_back_whatever_the_shard_size(
    tmp_path_factory: pytest.TempPathFactory, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, TENSORS.items(), shard_bytes=shard_bytes)
    read = dict(Checkpoint.open(folder).tensors())
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_shards_are_named_as_transformers_names_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items(), shard_bytes=48)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert index["metadata"]["total_size"] == 48 + 10 + 3
    assert set(load_file(tmp_path / "model-00002-of-00002.safetensors")) == {"b", "c"}


def test_a_small_checkpoint_is_one_file_without_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert Checkpoint.open(tmp_path).weight_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_weights_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items())
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged or cut short"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items(), shard_bytes=48)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00002\.safetensors: shard is missing"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items(), shard_bytes=48)
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["d"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="does not match"):
        Checkpoint.open(tmp_path)


def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", TENSORS.items())
    weight_map = dict.fromkeys(TENSORS, "other/model.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ArtifactError, match="outside"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_is_not_stored_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS.items())
    with pytest.raises(ArtifactError, match="tensor zz is missing"):
        Checkpoint.open(tmp_path).tensor("zz")


def test_a_full_disk_is_one_error_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    tensors = {"big": torch.zeros(100_000)}
    with full_disk(10_000), pytest.raises(ArtifactError) as caught:
        write_checkpoint(tmp_path, tensors.items())
    assert "cannot be written" in str(caught.value)
    assert "make room" in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_that_cannot_be_written_whole_is_not_there_in_part(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", "before")
    with full_disk(10_000), pytest.raises(ArtifactError, match="cannot be written"):
        write_json(tmp_path / "file.json", "x" * 100_000)
    with full_disk(10_000), pytest.raises(ArtifactError, match="cannot be written"):
        save_tensors(tmp_path / "file.safetensors", {"big": torch.zeros(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert json.loads((tmp_path / "file.json").read_text()) == "before"


def test_too_little_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="MiB free: make room"):
        require_space(tmp_path / "not" / "yet", 2**62)
    require_space(tmp_path, 1)
