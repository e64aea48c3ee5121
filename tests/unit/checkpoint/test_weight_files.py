"""Which files hold the weights: what readers would disagree about is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.checkpoint.json_file import LARGEST_JSON, read_json
from sparseserve.checkpoint.tensors import Checkpoint, write_checkpoint, write_json
from sparseserve.checkpoint.weight_files import plain_relative, unlisted_files, weight_files
from sparseserve.errors import ArtifactError, UnsupportedModelError
from sparseserve.models.model_folder import check_model_folder
from sparseserve.testing import save_tiny_model

TENSORS = {"a": torch.ones(4), "b": torch.ones(3)}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, TENSORS.items())
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, TENSORS.items(), shard_bytes=16)
    return tmp_path


def write_index(folder: Path, **files: object) -> None:
    write_json(folder / INDEX, {"metadata": {}, "weight_map": files})


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file as it is not written by its library."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_a_single_file_and_shards_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", TENSORS.items())
    write_checkpoint(tmp_path / "two", TENSORS.items(), shard_bytes=16)
    assert weight_files(tmp_path / "one").names == ("model.safetensors",)
    found = weight_files(tmp_path / "two")
    assert found.names == tuple(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert found.weight_map == dict(zip("ab", found.names, strict=True))


def test_an_index_of_the_single_file_says_the_same_and_is_no_conflict(single: Path) -> None:
    write_index(single, a="model.safetensors", b="model.safetensors")
    assert weight_files(single).names == ("model.safetensors",)
    assert Checkpoint.open(single).files == dict.fromkeys("ab", "model.safetensors")


def test_a_single_file_beside_the_index_of_others_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"holds both model\.safetensors and .*remove one"):
        weight_files(sharded)


@pytest.mark.parametrize(
    "name",
    [
        *("other.bin", "other.pt", "model.SAFETENSORS", "weights", ".hidden.safetensors"),
        *("../model.safetensors", "/model.safetensors", "sub/model.safetensors", "..", "."),
        *("", "\0.safetensors", "x" * 300 + ".safetensors", 7, None, ["model.safetensors"]),
        "\ud800",
    ],
)
def test_an_index_that_names_no_plain_safetensors_is_refused(tmp_path: Path, name: object) -> None:
    write_index(tmp_path, a=name)
    with pytest.raises(ArtifactError, match=r"index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors", 3])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_json(tmp_path / INDEX, {"weight_map": weight_map})
    with pytest.raises(ArtifactError, match="has no weight_map"):
        weight_files(tmp_path)


def test_a_configuration_that_sends_transformers_elsewhere_is_refused(single: Path) -> None:
    write_json(single / "config.json", {"transformers_weights": "model.safetensors"})
    assert weight_files(single).names == ("model.safetensors",)
    write_json(single / "config.json", {"transformers_weights": "other.safetensors"})
    with pytest.raises(ArtifactError, match=r"names 'other\.safetensors' instead of model"):
        weight_files(single)


def test_an_adapter_beside_the_weights_is_refused(single: Path) -> None:
    write_json(single / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ArtifactError, match="holds an adapter"):
        weight_files(single)


def test_safetensors_that_only_some_programs_would_read_are_refused(single: Path) -> None:
    (single / "more.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"more\.safetensors: vLLM reads it"):
        Checkpoint.open(single)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = weight_files(sharded).names
    (sharded / second).write_bytes((sharded / first).read_bytes())
    write_index(sharded, a=first, b=second)
    with pytest.raises(ArtifactError, match=f"both {first} and {second} hold a"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("kind", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"weights.{kind}").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match="can run code when read: convert"):
        weight_files(tmp_path)


A = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES: dict[str, tuple[Any, bytes, int | None]] = {
    "a header longer than the file": ({"a": A}, bytes(16), 2**20),
    "a header without end": ({"a": A}, bytes(16), 2**64 - 1),
    "a header cut short": ({"a": A}, bytes(16), 9),
    "no header": (b"", b"", 0),
    "no JSON": (b"{]", b"", None),
    "no object": (b"[]", b"", None),
    "less data than it says": ({"a": A}, bytes(15), None),
    "more data than it says": ({"a": A}, bytes(17), None),
    "offsets beyond the file": ({"a": {**A, "data_offsets": [16, 32]}}, bytes(16), None),
    "offsets that run backwards": ({"a": {**A, "data_offsets": [16, 0]}}, bytes(16), None),
    "offsets below zero": ({"a": {**A, "data_offsets": [-16, 0]}}, bytes(16), None),
    "a shape larger than its data": ({"a": {**A, "shape": [5]}}, bytes(16), None),
    "a shape without bounds": ({"a": {**A, "shape": [2**40, 2**40]}}, bytes(16), None),
    "a shape below zero": ({"a": {**A, "shape": [-4]}}, bytes(16), None),
    "a dtype that there is not": ({"a": {**A, "dtype": "F31"}}, bytes(16), None),
    "tensors that overlap": ({"a": A, "b": {**A, "data_offsets": [8, 24]}}, bytes(24), None),
    "a gap between tensors": ({"a": A, "b": {**A, "data_offsets": [20, 36]}}, bytes(36), None),
    "two tensors in one place": ({"a": A, "b": A}, bytes(16), None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, bytes(16), None),
    "nesting without end": (b'{"a":' * 100_000, b"", None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_does_not_fit_its_file_is_not_believed(tmp_path: Path, lie: str) -> None:
    header, data, length = LIES[lie]
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": A}, bytes(16))
    assert Checkpoint.open(tmp_path).tensor("a").equal(torch.zeros(4))
    write_raw(path, header, data, length)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged or cut short"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("lie", LIES)
def test_a_model_to_prune_is_held_to_the_same(tmp_path: Path, lie: str) -> None:
    folder = save_tiny_model("llama", tmp_path)
    check_model_folder(folder)
    write_raw(folder / "model.safetensors", *LIES[lie])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is cut short or damaged"):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
def test_a_pipe_is_refused_and_not_waited_for(single: Path, name: str) -> None:
    (single / name).unlink(missing_ok=True)
    os.mkfifo(single / name)
    with pytest.raises(ArtifactError, match=r"plain file|missing"):
        Checkpoint.open(single)


def test_json_without_bounds_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(ArtifactError, match="more than the 268,435,456 that are read"):
        read_json(tmp_path / "large.json")
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        read_json(tmp_path / "deep.json")


OPENED = [
    *("model.safetensors", "pytorch_model.bin", "model.pt", "model.gguf", "model.onnx", "x.pkl"),
    *("modeling_own.py", "params.json", "adapter_config.json", "chat_template.jinja", "merges.txt"),
    *("tokenizer.model", "tokenizer.model.v3", "vocab.tiktoken", "UPPER.SAFETENSORS", ".x.bin"),
    *("additional_chat_templates/tool.jinja", "original/consolidated.pth", "sub/own.py"),
    *("bpe.codes", "prophetnet.tokenizer", "model.tensors", "openvino_model.xml"),
]
NOT_OPENED = [
    *("README.md", "LICENSE", "picture.png", ".gitattributes", "notes", "bench/result.json"),
    *(".git/config", ".cache/huggingface/download/model.safetensors.metadata", "run.log"),
]


@pytest.mark.parametrize("name", OPENED)
def test_what_a_program_might_open_is_told_unless_it_is_listed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert list(unlisted_files(tmp_path, frozenset())) == [name]
    assert not list(unlisted_files(tmp_path, frozenset({name})))


@pytest.mark.parametrize("name", NOT_OPENED)
def test_what_no_program_opens_may_lie_beside_a_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    assert not list(unlisted_files(tmp_path, frozenset()))


def test_links_to_folders_and_pipes_are_told_whatever_their_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "link.md").symlink_to("/")
    (tmp_path / "nowhere.md").symlink_to(tmp_path / "absent")
    assert list(unlisted_files(tmp_path, frozenset())) == ["link.md", "nowhere.md", "pipe.md"]


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "./a"])
def test_a_name_that_leads_elsewhere_is_no_file_of_the_folder(name: str) -> None:
    assert not plain_relative(name)
    assert plain_relative("model.safetensors")
    assert plain_relative("templates/tool.jinja")
