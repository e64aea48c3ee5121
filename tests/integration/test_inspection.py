"""What a folder or file holds, told from its tensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseserve.errors import ArtifactError
from sparseserve.workflow.inspection import inspect_checkpoint
from tests.integration.command_line import Cli
from tests.integration.conftest import Prune

FIXTURES = Path(__file__).parents[1] / "data" / "foreign"


def test_inspection_tells_formats_and_sparsity_apart(prune: Prune, tmp_path: Path) -> None:
    packed = inspect_checkpoint(prune("llama").path)
    plain = inspect_checkpoint(tmp_path / "model-llama")
    assert packed.manifest is not None
    assert plain.manifest is None
    assert (packed.formats, plain.formats) == (("packed24",), ("dense",))
    facts = {item.name: item for item in packed.matrices}
    pruned = facts["model.layers.0.mlp.up_proj"]
    assert (pruned.two_four, pruned.pattern, pruned.axis) == (True, "2:4", 1)
    assert pruned.sparsity >= 0.5
    assert not facts["model.embed_tokens"].two_four
    assert {item.pattern for item in plain.matrices} == {"dense"}
    assert {item.name: item.shape for item in plain.matrices} == {
        name: item.shape for name, item in facts.items()
    }


@pytest.mark.parametrize("name", ["bitmask-bfloat16", "bitmask-int8", "marlin-int4"])
def test_formats_of_other_tools_are_shown_as_the_weights_they_stand_for(name: str) -> None:
    found = inspect_checkpoint(FIXTURES / name)
    facts = {item.name: item for item in found.matrices}
    assert found.formats == ("marlin-24" if "marlin" in name else "sparse-24-bitmask",)
    assert sum(item.two_four for item in facts.values()) == 7
    assert facts["model.layers.0.self_attn.q_proj"].shape == (64, 64)
    assert [(layer.two_four, layer.modules) for layer in found.fused] == [(2, 2), (3, 3)]


def test_a_layer_that_vllm_runs_as_one_counts_its_two_four_modules(tmp_path: Path) -> None:
    sparse = torch.tensor([[1.0, 0, 2, 0]]).repeat(4, 2)
    tensors = {"a.gate_proj.weight": sparse, "a.up_proj.weight": torch.ones(4, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (layer,) = inspect_checkpoint(tmp_path).fused
    assert (layer.name, layer.two_four, layer.modules) == ("a.gate_up_proj", 1, 2)


def test_shapes_say_which_kernels_and_degrees_are_possible(tmp_path: Path) -> None:
    tensors = {"small": torch.ones(6, 12), "large": torch.ones(64, 256)}
    save_file(tensors, tmp_path / "model.safetensors")
    facts = {item.name: item for item in inspect_checkpoint(tmp_path).matrices}
    assert facts["small"].kernels == ("cpu", "triton")
    assert (facts["small"].output_degrees, facts["small"].input_degrees) == ((1, 2), ())
    assert facts["large"].kernels == ("cpu", "triton", "cusparselt", "cutlass")
    assert facts["large"].output_degrees == facts["large"].input_degrees == (1, 2, 4, 8, 16)


def test_one_file_is_inspected_by_itself(prune: Prune, cli: Cli) -> None:
    file = prune("llama").path / "model.safetensors"
    done = cli("inspect", file, "--json")
    found = json.loads(done.stdout)
    assert found["formats"] == ["one file"]
    names = {item["name"] for item in found["matrices"]}
    assert "model.layers.0.mlp.up_proj.weight_indices" in names


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "notes.txt").write_text("no tensors")
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        inspect_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(ArtifactError, match="no such folder or file"):
        inspect_checkpoint(tmp_path / "nowhere")
    assert cli("inspect", tmp_path / "nowhere").returncode == 1
