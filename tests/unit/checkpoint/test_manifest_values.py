"""A manifest with a valid digest may still hold values that nothing can be done with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparseserve.checkpoint import packed24
from sparseserve.checkpoint.artifact import Artifact, FileEntry, Manifest, write_manifest
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.checkpoint.tensors import write_checkpoint
from sparseserve.checkpoint.verification import verify
from sparseserve.cli.main import cli
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model
from sparseserve.workflow.inspection import inspect_checkpoint

PRUNED = "model.layers.0.mlp.up_proj"
LISTS = ("pruned", "transposed", "tensors")
OBJECTS = ("recipe", "calibration", "report")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    tensors = tiny_model("llama").state_dict()
    packed = pack24(TWO_FOUR.project(tensors.pop(f"{PRUNED}.weight")))
    tensors[f"{PRUNED}.weight_values"] = packed.values
    tensors[f"{PRUNED}.weight_indices"] = packed.indices
    write_checkpoint(place, tensors.items())
    config = packed24.quantization_config([PRUNED], torch.float32)
    (place / "config.json").write_text(json.dumps({"quantization_config": config}))
    write_manifest(place, Manifest("packed24", "2:4", (PRUNED,), (), "tiny", {}, {}, {}, {}))
    return place


def reseal(folder: Path, **changes: object) -> None:
    """Change the manifest and give it a valid digest, as whoever wants to do harm would."""
    path = folder / "sparseserve.json"
    body = {**json.loads(path.read_text()), **changes}
    del body["manifest_sha256"]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps({**body, "manifest_sha256": digest}))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [5, "name", {"a": 1}, [1], [["a"]], None, True])
@pytest.mark.parametrize("key", LISTS)
def test_a_list_of_names_is_one(folder: Path, key: str, value: object) -> None:
    reseal(folder, **{key: value})
    assert f"sparseserve.json: {key} is " in refusal(folder)


@pytest.mark.parametrize("value", [5, "x", [], None])
@pytest.mark.parametrize("key", [*OBJECTS, "files"])
def test_an_object_is_one(folder: Path, key: str, value: object) -> None:
    reseal(folder, **{key: value})
    assert f"{key} is " in refusal(folder)


@pytest.mark.parametrize("value", [5, [], None, {}])
@pytest.mark.parametrize("key", ["pattern", "source"])
def test_a_text_is_one(folder: Path, key: str, value: object) -> None:
    reseal(folder, **{key: value})
    assert f"{key} is " in refusal(folder)


@pytest.mark.parametrize("name", ["a" * 300, f"x/{'ü' * 200}", "../a", "/etc/passwd", "", "a\0b"])
def test_a_file_that_can_be_none_of_the_folder_is_refused(folder: Path, name: str) -> None:
    files = json.loads((folder / "sparseserve.json").read_text())["files"]
    reseal(folder, files={**files, name: {"sha256": "0", "bytes": 1}})
    assert "can be no file of the folder" in refusal(folder)


@pytest.mark.parametrize(
    "entry", [5, [], {}, {"sha256": 1, "bytes": 1}, {"sha256": "0"}, {"sha256": "0", "bytes": "1"}]
)
def test_a_file_has_a_hash_and_a_size(folder: Path, entry: object) -> None:
    files = json.loads((folder / "sparseserve.json").read_text())["files"]
    reseal(folder, files={**files, "model.safetensors": entry})
    assert "files model.safetensors is " in refusal(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
BODY = Manifest("dense", "2:4", (), (), "tiny", {}, {}, {}, {"a": FileEntry("0" * 64, 1)}).to_json()


@given(st.sampled_from(sorted(BODY)), json_values)
def test_any_value_of_any_key_is_a_manifest_or_refused(key: str, value: object) -> None:
    body = json.loads(json.dumps({**BODY, key: value}))
    if key != "manifest_sha256":
        del body["manifest_sha256"]
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["manifest_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    try:
        found = Manifest.from_json(body, Path("sparseserve.json"))
    except ArtifactError:
        return
    assert json.loads(json.dumps(found.to_json())) == body


@pytest.mark.parametrize("shape", [(-1,), (1, 1, -1)])
def test_packed_values_that_are_no_matrix_are_refused(folder: Path, shape: tuple[int, ...]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"{PRUNED}.weight_values"
    tensors[name] = tensors[name].reshape(shape)
    save_file(tensors, file, metadata={"format": "pt"})
    entry = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
    }
    files = json.loads((folder / "sparseserve.json").read_text())["files"]
    reseal(folder, files={**files, "model.safetensors": entry})
    assert "no matrix" in refusal(folder)
    with pytest.raises(ArtifactError, match="no matrix"):
        inspect_checkpoint(folder)


def test_json_that_is_nested_too_deeply_is_refused(folder: Path) -> None:
    (folder / "sparseserve.json").write_text("[" * 100_000)
    assert "cannot be read as JSON" in refusal(folder)


@pytest.mark.parametrize("source", ["[/x]", "[bold]m[/bold]", "m[0]", "]["])
def test_names_with_brackets_are_shown_as_they_are(folder: Path, source: str) -> None:
    reseal(folder, source=source)
    assert Artifact.open(folder).manifest.source == source
    for command in ("inspect", "verify"):
        done = CliRunner().invoke(cli, [command, str(folder)], catch_exceptions=False)
        assert done.exit_code == 0
        assert command == "verify" or f"from {source}" in done.stdout
