"""The table of formats: every row stores, gives back and exports what it says it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseserve.checkpoint.formats import FORMATS, default_format, require_fit
from sparseserve.checkpoint.storage import storage_of
from sparseserve.checkpoint.tensors import Checkpoint, write_checkpoint
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.exporters import EXPORTERS
from sparseserve.sparsity import TWO_FOUR


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (32, 64)])
@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.storage])
def test_each_format_gives_back_what_it_stores(
    name: str, shape: tuple[int, int], transposed: bool, tmp_path: Path
) -> None:
    storage = storage_of(name)
    generator = torch.Generator().manual_seed(0)
    weight = TWO_FOUR.project(torch.randn(shape, generator=generator))
    weight = weight.to(storage.kept_dtype(weight.dtype))
    stored = storage.stored(weight, transposed=transposed)
    write_checkpoint(tmp_path, ((f"layer.{leaf}", part) for leaf, part in stored.items()))
    checkpoint = Checkpoint.open(tmp_path)
    assert set(storage.names(checkpoint, "layer")) == set(checkpoint.files)
    assert storage.read_weight(checkpoint, "layer", transposed=transposed).equal(weight)
    storage.check_weight(checkpoint, "layer", weight)


def test_every_format_has_an_exporter_and_the_default_one_fits_the_pattern() -> None:
    assert EXPORTERS.keys() == FORMATS.keys()
    assert default_format("2:4") == "packed24"
    for pattern in ("2:4", "1:4", "50%"):
        require_fit(default_format(pattern), pattern)


def test_a_format_that_cannot_hold_the_pattern_is_refused_with_one_that_can() -> None:
    with pytest.raises(
        ArtifactError, match=r"packed24 holds only 2:4 .* not 50%: use --format dense"
    ):
        require_fit("packed24", "50%")
    with pytest.raises(RecipeError, match="unknown format 'packed42': did you mean 'packed24'"):
        require_fit("packed42", "2:4")
