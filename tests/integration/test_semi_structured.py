"""A semi_structured checkpoint in torch's own classes, on reference operators for the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from sparseserve import load_semi_structured
from sparseserve.errors import ArtifactError
from sparseserve.exporters import EXPORTERS
from sparseserve.huggingface.semi_structured import make_sparse
from tests.integration.conftest import Prune
from tests.serving.torch_operators import operators_on_cpu

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
IDS = torch.arange(10, 42)[None]


@pytest.fixture
def operators() -> Iterator[None]:
    with operators_on_cpu():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, prune_into: Prune) -> dict[str, Path]:
    """Export a pruned model for torch, once with each name of its family."""
    found = {}
    for family in ("llama", "gpt2", "nemotron_h"):
        root = tmp_path_factory.mktemp(family)
        packed = prune_into(root / "packed", family)
        found[family] = EXPORTERS["semi_structured"](packed, root / "semi", None).path
    return found


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_cutlass_tensors_compute_what_the_dense_model_computes(
    exported: dict[str, Path], family: str
) -> None:
    dense = load_semi_structured(exported[family], "cpu")
    sparse = load_semi_structured(exported[family], "cpu")
    make_sparse(sparse, exported[family], torch.device("cpu"), as_stored=True)
    classes = [type(parameter.data) for parameter in sparse.parameters()]
    assert classes.count(SparseSemiStructuredTensorCUTLASS) >= 6
    with torch.no_grad():
        torch.testing.assert_close(sparse(IDS).logits, dense(IDS).logits, rtol=0, atol=0.05)


@pytest.mark.usefixtures("operators")
def test_other_cards_compress_what_was_stored(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a card torch asks for CUDA tensors, which there are none of here.
    for kind in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda tensor: None)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", False)
    dense = load_semi_structured(exported["llama"], "cpu")
    sparse = load_semi_structured(exported["llama"], "cpu")
    make_sparse(sparse, exported["llama"], torch.device("cpu"), as_stored=False)
    classes = [type(parameter.data) for parameter in sparse.parameters()]
    assert classes.count(SparseSemiStructuredTensorCUSPARSELT) >= 6
    with torch.no_grad():
        torch.testing.assert_close(sparse(IDS).logits, dense(IDS).logits, rtol=0, atol=0.05)


@pytest.mark.usefixtures("operators")
def test_the_lines_of_plain_torch_on_the_page_make_a_layer(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- test: semi_structured -->\n```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    name = "model.layers.0.mlp.up_proj"
    names = {"torch": torch, "safetensors": safetensors, "device": "cpu", "name": name}
    monkeypatch.chdir(exported["llama"])
    exec(block[1], names)
    dense = load_semi_structured(exported["llama"], "cpu").get_submodule(name)
    inputs = torch.randn(8, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        found = names["linear"](inputs)  # type: ignore[operator]
        torch.testing.assert_close(found, dense(inputs), rtol=0, atol=0.02)


def test_weights_that_the_model_stores_transposed_stay_dense(exported: dict[str, Path]) -> None:
    model = load_semi_structured(exported["gpt2"], "cpu")
    make_sparse(model, exported["gpt2"], torch.device("cpu"), as_stored=True)
    kinds = {type(parameter.data) for parameter in model.parameters()}
    assert SparseSemiStructuredTensorCUTLASS not in kinds


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, prune_into: Prune) -> None:
    packed = prune_into(tmp_path / "packed", "llama")
    with pytest.raises(ArtifactError, match="its format is packed24, not semi_structured"):
        load_semi_structured(packed.path, "cpu")
