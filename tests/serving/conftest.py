from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseserve.checkpoint.artifact import Manifest, write_manifest
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.checkpoint.stacks import stacks_from_json
from sparseserve.huggingface.experts import routers_in, unstacked_experts
from sparseserve.huggingface.names import stored_modules
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model, tiny_tokenizer
from tests.serving.torch_operators import operators_on_cpu

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def kernels_without_timing() -> None:
    """Run 2:4 layers on our own kernels whatever is fastest; layers that are 2:4 in part, too."""
    if missing_library() is None:
        os.environ["SPARSESERVE_KERNELS"] = "cpu_unpacked,cpu_dense,cpu_int8"


@pytest.fixture(params=["dense", "cpu_unpacked,cpu_dense"])
def kernels_in_turn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on vLLM's own product and on our kernels."""
    if request.param != "dense" and missing_library() is not None:
        pytest.skip(str(missing_library()))
    monkeypatch.setenv("SPARSESERVE_KERNELS", request.param)


@pytest.fixture(scope="module")
def torch_operators() -> Iterator[None]:
    """Let a CPU run torch's operators for NVIDIA's cards."""
    with operators_on_cpu():
        yield


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    routers = routers_in(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not model.get_output_embeddings()
        and name not in routers
    }


def dense_manifest(
    pruned: Sequence[str], pattern: str = str(TWO_FOUR), transposed: Sequence[str] = ()
) -> Manifest:
    """Say which linears of a dense model are 2:4, and nothing of how they became so."""
    return Manifest(
        format="dense",
        pattern=pattern,
        pruned=tuple(pruned),
        transposed=tuple(transposed),
        source="tiny",
        recipe={},
        calibration={},
        report={},
        files={},
    )


@pytest.fixture(scope="session")
def two_four_folder(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Save a tiny model with 2:4 linears; names that hold a string of ``keep`` stay dense."""

    def make(
        family: str,
        *,
        keep: tuple[str, ...] = (),
        manifest: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Path:
        model = tiny_model(family).to(dtype)
        with unstacked_experts(model):
            chosen = {
                name: module
                for name, module in linears(model).items()
                if not any(part in name for part in keep)
            }
            for module in chosen.values():
                weight = module.get_parameter("weight").detach()
                weight = weight.T if isinstance(module, Conv1D) else weight
                weight.copy_(TWO_FOUR.project(weight))
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        if manifest:
            places = stored_modules(model, [*chosen])
            turned = [places[n].name for n, module in chosen.items() if isinstance(module, Conv1D)]
            written = dense_manifest([place.name for place in places.values()], transposed=turned)
            stacks = {place.stack for place in places.values() if place.stack}
            write_manifest(folder, replace(written, stacks=tuple(stacks)))
        return folder

    return make


@pytest.fixture(scope="session")
def pack_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Write the packed24 form of a folder of ``two_four_folder``, by hand."""

    def pack(dense: Path) -> Path:
        folder = tmp_path_factory.mktemp(f"{dense.name}-packed")
        config = json.loads((dense / "config.json").read_text())
        manifest = json.loads((dense / "sparseserve.json").read_text())
        pruned = manifest["pruned"]
        stacks = {stack.tensor: stack for stack in stacks_from_json("", manifest["stacks"])}
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(dense / "model.safetensors").items():
            module, _, leaf = name.rpartition(".")
            weights: dict[str, torch.Tensor] = {}
            if name in stacks:
                stack = stacks[name]
                weights = {one: stack.weight(tensor, *stack.place(one)) for one in stack.modules}
            elif module in pruned and leaf == "weight":
                weights = {module: tensor.T if config["model_type"] == "gpt2" else tensor}
            else:
                tensors[name] = tensor
            for module, weight in weights.items():
                packed = pack24(weight.contiguous())
                tensors[f"{module}.weight"] = packed.values
                tensors[f"{module}.weight_indices"] = packed.indices
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config["quantization_config"] = {
            "quant_method": "sparseserve",
            "version": 2,
            "format": "packed24",
            "pattern": "2:4",
            "modules": pruned,
            "weights": {"type": "float", "bits": 32, "group_size": None},
            "activations": None,
            "stacks": manifest["stacks"],
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return pack


@pytest.fixture(scope="session")
def pair(two_four_folder: MakeFolder, pack_folder: Callable[[Path], Path]) -> tuple[Path, Path]:
    """A packed folder and the dense one; nothing may write to them."""
    dense = two_four_folder("llama")
    return pack_folder(dense), dense
