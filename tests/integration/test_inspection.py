"""What a folder holds, told from the files alone."""

from __future__ import annotations

from pathlib import Path

from sparseserve.checkpoint.inspection import inspect_checkpoint
from tests.integration.conftest import Prune


def test_inspection_tells_formats_and_sparsity_apart(prune: Prune, tmp_path: Path) -> None:
    packed = inspect_checkpoint(prune("llama").path)
    plain = inspect_checkpoint(tmp_path / "model-llama")
    assert packed.manifest is not None
    assert plain.manifest is None
    facts = {item.name: item for item in packed.matrices}
    pruned = facts["model.layers.0.mlp.up_proj"]
    assert pruned.two_four
    assert pruned.sparsity >= 0.5
    assert not facts["model.embed_tokens"].two_four
    assert not any(item.two_four for item in plain.matrices)
    assert {item.name: item.shape for item in plain.matrices} == {
        name: item.shape for name, item in facts.items()
    }
