from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparseserve.checkpoint.artifact import Manifest, write_manifest
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.huggingface.names import stored_name
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model, tiny_tokenizer
from tests.serving.torch_operators import operators_on_cpu

MakeFolder = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def kernels_without_timing() -> None:
    """Run 2:4 layers on our own kernels whatever is fastest; layers that are 2:4 in part, too."""
    if missing_library() is None:
        os.environ["SPARSESERVE_KERNELS"] = "cpu_unpacked,cpu_dense"


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
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
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
        pruned = [name for name in linears(model) if not any(part in name for part in keep)]
        for name in pruned:
            module = model.get_submodule(name)
            transposed = isinstance(module, Conv1D)
            weight = module.weight.T if transposed else module.weight
            projected = TWO_FOUR.project(weight.detach())
            module.weight.data = projected.T.contiguous() if transposed else projected
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        if manifest:
            names = {name: stored_name(model, name) or name for name in pruned}
            turned = [names[n] for n in pruned if isinstance(model.get_submodule(n), Conv1D)]
            write_manifest(folder, dense_manifest([*names.values()], transposed=turned))
        return folder

    return make


@pytest.fixture(scope="session")
def pack_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Write the packed24 form of a folder of ``two_four_folder``, by hand."""

    def pack(dense: Path) -> Path:
        folder = tmp_path_factory.mktemp(f"{dense.name}-packed")
        config = json.loads((dense / "config.json").read_text())
        pruned = json.loads((dense / "sparseserve.json").read_text())["pruned"]
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(dense / "model.safetensors").items():
            module, _, leaf = name.rpartition(".")
            if module in pruned and leaf == "weight":
                weight = tensor.T if config["model_type"] == "gpt2" else tensor
                packed = pack24(weight.contiguous())
                tensors[f"{module}.weight"] = packed.values
                tensors[f"{module}.weight_indices"] = packed.indices
            else:
                tensors[name] = tensor
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config["quantization_config"] = {
            "quant_method": "sparseserve",
            "version": 2,
            "format": "packed24",
            "pattern": "2:4",
            "modules": pruned,
            "weights": {"type": "float", "bits": 32, "group_size": None},
            "activations": None,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return pack


@pytest.fixture(scope="session")
def pair(two_four_folder: MakeFolder, pack_folder: Callable[[Path], Path]) -> tuple[Path, Path]:
    """A packed folder and the dense one; nothing may write to them."""
    dense = two_four_folder("llama")
    return pack_folder(dense), dense
