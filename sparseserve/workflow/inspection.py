"""What a checkpoint holds, whoever wrote it, and what could be done with each of its matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact, Manifest
from sparseserve.checkpoint.packed24 import COLUMNS_PER_BYTE
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError
from sparseserve.foreign.source import ForeignCheckpoint
from sparseserve.serving.kernels.limits import SHAPE_LIMITS
from sparseserve.sparsity import TWO_FOUR, strictest_pattern

# Layers that vLLM runs as one, and the modules they are made of.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_DEGREES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class MatrixFacts:
    """One matrix; shape, zeros and pattern are those of the dense form.

    Attributes:
        name: Of the module, without ``.weight``.
        dtype: Of the stored values.
        shape: ``[out, in]`` of a linear; some families store it the other way round.
        sparsity: Share of zeros.
        pattern: The strictest that it obeys: N:M, a share of zeros anywhere, or dense.
        axis: Along which N:M holds: 1 is the inputs of a linear, 0 its outputs; else None.
        two_four: Whether it is 2:4, or stricter, along its second axis.
        kernels: Which sparse kernels take a 2:4 weight of this shape.
        input_degrees: Tensor-parallel degrees that cut a packed weight along its inputs.
        output_degrees: Those that cut it along its outputs.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    sparsity: float
    pattern: str
    axis: int | None
    two_four: bool
    kernels: tuple[str, ...]
    input_degrees: tuple[int, ...]
    output_degrees: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FusedFacts:
    """A layer that vLLM runs as one, and how many of its modules are 2:4."""

    name: str
    two_four: int
    modules: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A folder or file: its manifest, if sparseserve wrote it, and its matrices."""

    path: Path
    manifest: Manifest | None
    formats: tuple[str, ...]
    matrices: tuple[MatrixFacts, ...]
    fused: tuple[FusedFacts, ...]
    weight_bytes: int


def inspect_checkpoint(path: Path) -> Inspection:
    """Read a safetensors checkpoint, or one file of it, of any origin.

    One matrix is in memory at a time; tensors that are no matrices are not read.

    Raises:
        ArtifactError: There is no such folder or file, it holds no readable safetensors, or a
            weight is stored in a way that is not read here.
    """
    if path.is_file():
        checkpoint = Checkpoint.of_file(path)
        return _inspection(path, None, ("one file",), checkpoint, _plain(checkpoint))
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such folder or file")
    if (path / MANIFEST_FILE).exists():
        artifact = Artifact.open(path)
        checkpoint = artifact.checkpoint
        formats = (artifact.manifest.format,)
        return _inspection(path, artifact.manifest, formats, checkpoint, _ours(artifact))
    if not (path / "config.json").is_file():
        checkpoint = Checkpoint.open(path)
        return _inspection(path, None, ("dense",), checkpoint, _plain(checkpoint))
    foreign = ForeignCheckpoint.open(path)
    return _inspection(path, None, foreign.formats, foreign.checkpoint, foreign.matrices())


def _inspection(
    path: Path,
    manifest: Manifest | None,
    formats: tuple[str, ...],
    checkpoint: Checkpoint,
    matrices: Iterator[tuple[str, Tensor]],
) -> Inspection:
    facts = tuple(_facts(name, weight) for name, weight in matrices)
    fused = tuple(_fused({item.name: item for item in facts}))
    return Inspection(path, manifest, formats, facts, fused, checkpoint.weight_bytes)


def _ours(artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    checkpoint = artifact.checkpoint
    parts = artifact.parts(checkpoint)
    stacks = {stack.tensor: stack for stack in artifact.manifest.stacks}
    for name in sorted(checkpoint.files):
        if name in stacks:
            tensor = checkpoint.tensor(name)
            for module in stacks[name].modules:
                yield module, stacks[name].weight(tensor, *stacks[name].place(module))
        elif name not in parts:
            yield from _plain(checkpoint, name)
        elif parts[name].stands_for_all:
            yield parts[name].module, artifact.pruned_weight(checkpoint, parts[name].module)


def _plain(checkpoint: Checkpoint, *names: str) -> Iterator[tuple[str, Tensor]]:
    for name in names or sorted(checkpoint.files):
        if len(checkpoint.shape(name)) == 2:
            yield name.removesuffix(".weight"), checkpoint.tensor(name)


def _facts(name: str, weight: Tensor) -> MatrixFacts:
    rows, columns = weight.shape
    pattern, axis = strictest_pattern(weight)
    fits = columns % TWO_FOUR.group == 0
    return MatrixFacts(
        name=name,
        dtype=dtype_name(weight.dtype),
        shape=(rows, columns),
        sparsity=float((weight == 0).sum()) / max(weight.numel(), 1),
        pattern=pattern,
        axis=axis,
        two_four=fits and TWO_FOUR.first_violation(weight) is None,
        kernels=tuple(
            kernel
            for kernel, (by_rows, by_columns) in SHAPE_LIMITS.items()
            if rows % by_rows == 0 and columns % by_columns == 0
        ),
        input_degrees=tuple(d for d in _DEGREES if columns % (d * COLUMNS_PER_BYTE) == 0),
        output_degrees=tuple(degree for degree in _DEGREES if rows % degree == 0),
    )


def _fused(facts: dict[str, MatrixFacts]) -> Iterator[FusedFacts]:
    for name in facts:
        parent, dot, leaf = name.rpartition(".")
        for fused, leaves in FUSED.items():
            parts = [facts.get(f"{parent}{dot}{part}") for part in leaves]
            if leaf == leaves[0] and all(parts):
                sparse = sum(part.two_four for part in parts if part)
                yield FusedFacts(f"{parent}{dot}{fused}", sparse, len(parts))
