"""What a checkpoint folder holds, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact, Manifest
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError
from sparseserve.sparsity import TWO_FOUR


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One matrix; ``shape`` and ``sparsity`` are those of the dense form.

    ``two_four`` says whether it is 2:4 along its second axis, the input features of a linear.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    sparsity: float
    two_four: bool


@dataclass(frozen=True, slots=True)
class Inspection:
    """A folder: its manifest, if sparseserve wrote it, and its matrices."""

    path: Path
    manifest: Manifest | None
    matrices: tuple[TensorFacts, ...]
    weight_bytes: int


def inspect_checkpoint(path: Path) -> Inspection:
    """Read a safetensors checkpoint of any origin.

    Raises:
        ArtifactError: There is no such folder, or it holds no readable safetensors.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder")
    artifact = Artifact.open(path) if (path / MANIFEST_FILE).exists() else None
    checkpoint = Checkpoint.open(path)
    facts = tuple(_facts(name, weight) for name, weight in _matrices(checkpoint, artifact))
    manifest = artifact.manifest if artifact else None
    return Inspection(path, manifest, facts, checkpoint.weight_bytes)


def _matrices(checkpoint: Checkpoint, artifact: Artifact | None) -> Iterator[tuple[str, Tensor]]:
    parts = artifact.parts(checkpoint) if artifact else {}
    for name in sorted(checkpoint.files):
        if artifact and name in parts:
            if parts[name].stands_for_all:
                yield parts[name].module, artifact.pruned_weight(checkpoint, parts[name].module)
        elif (tensor := checkpoint.tensor(name)).dim() == 2:
            yield name.removesuffix(".weight"), tensor


def _facts(name: str, weight: Tensor) -> TensorFacts:
    rows, columns = weight.shape
    fits = columns % TWO_FOUR.group == 0
    return TensorFacts(
        name=name,
        dtype=dtype_name(weight.dtype),
        shape=(rows, columns),
        sparsity=float((weight == 0).sum()) / max(weight.numel(), 1),
        two_four=fits and TWO_FOUR.first_violation(weight) is None,
    )
