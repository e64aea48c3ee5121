"""A damaged checkpoint is named; a killed run goes on and ends the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseserve.checkpoint.artifact import CARD_FILE, MANIFEST_FILE, Artifact, file_sha256
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.checkpoint.tensors import save_tensors
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.streams import HiddenStreams
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda
from sparseserve.report import OperatorReport, PruneReport


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def reseal(folder: Path) -> None:
    """Write hashes that fit the damaged files, so that only the deeper checks can object."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest.pop("manifest_sha256")
    for name, entry in manifest["files"].items():
        entry["sha256"] = file_sha256(folder / name)
        entry["bytes"] = (folder / name).stat().st_size
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "manifest_sha256": digest}))


def change_tensor(folder: Path, name: str, change: Any) -> None:
    tensors = dict(Artifact.open(folder).checkpoint.tensors())
    change(tensors[name])
    save_tensors(folder / "model.safetensors", tensors)
    reseal(folder)


@pytest.fixture
def packed(prune: Any) -> Path:
    path: Path = prune("llama").path
    return path


def test_every_single_changed_byte_is_noticed_and_its_file_named(packed: Path) -> None:
    for file in sorted(packed.iterdir()):
        if file.name == CARD_FILE:
            continue
        size = file.stat().st_size
        for place in {0, size // 2, size - 2}:
            original = file.read_bytes()
            flip_byte(file, place)
            with pytest.raises(ArtifactError, match=file.name.replace(".", r"\.")):
                verify(packed)
            file.write_bytes(original)
    verify(packed)


def test_a_checkpoint_cut_short_is_named(packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged or cut short"):
        verify(packed)


def test_a_missing_file_is_named(packed: Path) -> None:
    (packed / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: listed in .* but missing"):
        verify(packed)


def test_a_weight_file_that_is_not_listed_is_named(packed: Path) -> None:
    shutil.copy(packed / "model.safetensors", packed / "extra.safetensors")
    with pytest.raises(ArtifactError, match=r"extra\.safetensors: not listed"):
        verify(packed)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        verify(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"has no sparseserve\.json"):
        verify(tmp_path)


def test_a_tensor_that_is_not_finite_is_named(packed: Path) -> None:
    name = "model.norm.weight"
    change_tensor(packed, name, lambda tensor: tensor.fill_(float("nan")))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight has NaN or infinite"):
        verify(packed)


def test_indices_that_do_not_ascend_are_named(packed: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    change_tensor(packed, f"{name}.weight_indices", lambda tensor: tensor.fill_(0))
    with pytest.raises(ArtifactError, match=f"{name}: indices at row 0, group 0 do not ascend"):
        verify(packed)


def test_an_encoding_that_is_not_canonical_is_named(packed: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"

    def blank_first_group(values: torch.Tensor) -> None:
        values[0, :2] = 0

    def use_high_positions(indices: torch.Tensor) -> None:
        indices[0, 0] = (indices[0, 0] & 0xF0) | (2 | 3 << 2)

    change_tensor(packed, f"{name}.weight", blank_first_group)
    change_tensor(packed, f"{name}.weight_indices", use_high_positions)
    with pytest.raises(ArtifactError, match=f"{name}: encoding is not the canonical one"):
        verify(packed)


def test_a_negative_zero_is_not_canonical(packed: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    change_tensor(packed, f"{name}.weight", lambda values: values[0, :2].fill_(-0.0))
    change_tensor(packed, f"{name}.weight_indices", lambda indices: indices[0, :1].fill_(0x44))
    with pytest.raises(ArtifactError, match="canonical"):
        verify(packed)


def test_a_dense_weight_that_breaks_the_pattern_is_named(prune: Any) -> None:
    folder = prune("gpt2", export_format="dense").path
    name = "transformer.h.0.mlp.c_proj"
    change_tensor(folder, f"{name}.weight", lambda tensor: tensor.fill_(1.0))
    with pytest.raises(ArtifactError, match=f"{name} is not 2:4: row 0, columns from 0: 4"):
        verify(folder)


class Killed(Exception):
    """Stands for the death of the process."""


class KilledAfter(PruneProgress):
    """A progress that dies when it has heard of a number of operators."""

    def __init__(self, operators: int) -> None:
        self.left = operators
        self.seen: list[str] = []

    def operator_pruned(self, report: OperatorReport) -> None:
        self.seen.append(report.name)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("correction", ["intra", "intra+inter"])
@pytest.mark.parametrize("operators", [1, 6, 9])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    prune: Any, with_pruner: Any, operators: int, correction: str
) -> None:
    recipe = with_pruner(SparseGPT(), error_correction=correction)
    whole = prune("gemma3_text", "whole", recipe=recipe)
    with pytest.raises(Killed):
        prune("gemma3_text", "killed", recipe=recipe, progress=KilledAfter(operators))
    out = whole.path.parent / "killed"
    assert not out.exists()
    again = KilledAfter(-1)
    prune("gemma3_text", "killed", recipe=recipe, progress=again)
    assert len(again.seen) == len(whole.manifest.pruned) - 7 * (operators // 7)
    for name in ("model.safetensors", "config.json", CARD_FILE):
        assert (out / name).read_bytes() == (whole.path / name).read_bytes()
    assert not (out.parent / "killed.partial").exists()


def test_a_run_killed_after_its_last_layer_runs_no_layer_again(
    prune: Any, with_pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledWhileWriting(PruneProgress):
        def stage(self, text: str) -> None:
            if text == "writing the checkpoint":
                raise Killed

    recipe = with_pruner(Wanda(), error_correction="intra+inter")
    whole = prune("llama", "whole", recipe=recipe)
    with pytest.raises(Killed):
        prune("llama", "killed", recipe=recipe, progress=KilledWhileWriting())
    monkeypatch.delattr(HiddenStreams, "enter")
    killed = prune("llama", "killed", recipe=recipe)
    file = "model.safetensors"
    assert (killed.path / file).read_bytes() == (whole.path / file).read_bytes()
    assert len(PruneReport.from_json(killed.manifest.report).layers) == 2


def test_a_killed_run_rotates_the_values_of_the_layers_that_are_left(
    prune: Any, with_pruner: Any
) -> None:
    recipe = with_pruner(Wanda(), error_correction="intra+inter", rotate="heads")
    whole = prune("llama", "whole", recipe=recipe)
    with pytest.raises(Killed):
        prune("llama", "killed", recipe=recipe, progress=KilledAfter(9))
    prune("llama", "killed", recipe=recipe)
    file = "model.safetensors"
    assert (whole.path.parent / "killed" / file).read_bytes() == (whole.path / file).read_bytes()
    report = PruneReport.from_json(whole.manifest.report)
    assert [len(layer.rotations) for layer in report.layers] == [1, 1]
    assert verify(whole.path).manifest.recipe["rotate"] == "heads"
    assert "the values of attention in 2 layers" in (whole.path / "README.md").read_text()


def test_a_model_without_heads_to_rotate_is_pruned_as_without_and_this_is_said(
    prune: Any, with_pruner: Any
) -> None:
    class Said(PruneProgress):
        def stage(self, text: str) -> None:
            texts.append(text)

    texts: list[str] = []
    plain = prune("gpt_neox", "plain", recipe=with_pruner(Wanda()))
    recipe = with_pruner(Wanda(), rotate="heads")
    rotated = prune("gpt_neox", "rotated", recipe=recipe, progress=Said())
    assert "rotating no heads: nowhere in this model can values be rotated" in texts
    file = "model.safetensors"
    assert (rotated.path / file).read_bytes() == (plain.path / file).read_bytes()


def test_the_time_of_layers_finished_before_the_kill_counts(prune: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        prune("llama", progress=KilledAfter(9))
    [stored] = (tmp_path / "out.partial").rglob("report.json")
    sealed = read_sealed(stored)
    assert isinstance(sealed, dict)
    sealed["report"]["seconds"] = 1000.0
    write_sealed(stored, sealed)
    assert 1000 < prune("llama").manifest.report["seconds"] < 2000


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(
    prune: Any, with_pruner: Any
) -> None:
    with pytest.raises(Killed):
        prune("llama", progress=KilledAfter(3))
    with pytest.raises(ArtifactError, match="unfinished run with another model, recipe"):
        prune("llama", recipe=with_pruner(SparseGPT()))


def test_an_unfinished_run_goes_on_in_the_arithmetic_it_was_begun_with(
    prune: Any, with_pruner: Any
) -> None:
    with pytest.raises(Killed):
        prune(
            "llama", recipe=with_pruner(Wanda(), compute_dtype="float32"), progress=KilledAfter(3)
        )
    with pytest.raises(ArtifactError, match=r"\(different: .*recipe compute_dtype"):
        prune("llama", recipe=with_pruner(Wanda(), compute_dtype="bfloat16"))


def test_an_output_folder_that_is_not_empty_is_left_alone(prune: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(ArtifactError, match="out: exists and is not empty"):
        prune("llama")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_an_empty_output_folder_is_used(prune: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert verify(prune("llama").path).path == tmp_path / "out"
