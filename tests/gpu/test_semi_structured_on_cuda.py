"""A semi_structured checkpoint on a card: torch's kernels on the tensors as they are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseserve import load_semi_structured
from sparseserve.checkpoint.artifact import Manifest, write_manifest
from sparseserve.exporters import export_semi_structured
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor"),
]
IDS = torch.arange(10, 74)[None]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("semi")
    model = tiny_model("llama")
    pruned = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    for name in pruned:
        weight = model.get_parameter(f"{name}.weight")
        weight.data = TWO_FOUR.project(weight.data)
    model.save_pretrained(root / "dense")
    tiny_tokenizer().save_pretrained(root / "dense")
    manifest = Manifest(
        format="dense",
        pattern="2:4",
        pruned=tuple(pruned),
        transposed=(),
        source="tiny",
        recipe={},
        calibration={},
        report={},
        files={},
    )
    dense = write_manifest(root / "dense", manifest)
    return export_semi_structured(dense, root / "semi", request.param).path


def test_a_card_computes_with_stored_tensors_what_it_computes_with_dense_ones(
    exported: Path,
) -> None:
    dense = load_semi_structured(exported, "cpu").to("cuda")
    sparse = load_semi_structured(exported, "cuda")
    kinds = {type(parameter.data).__name__ for parameter in sparse.parameters()}
    assert any(name.startswith("SparseSemiStructuredTensor") for name in kinds)
    with torch.no_grad():
        found, expected = sparse(IDS.cuda()).logits.float(), dense(IDS.cuda()).logits.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
