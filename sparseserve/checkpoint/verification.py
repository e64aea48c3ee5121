"""Checking all that a checkpoint says of itself, or as much of it as is quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.storage import quantized_storage_of, storage_of
from sparseserve.checkpoint.tensors import Checkpoint, all_finite
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.sparsity import SparsityPattern


def verify(path: Path, on_file: Callable[[str], None] = lambda name: None) -> Artifact:
    """Check a checkpoint byte by byte and tensor by tensor.

    Every file has its hash, no other is there for a program to read, every tensor is finite, every
    pruned weight obeys the pattern, and every packed one has its one canonical encoding.

    Args:
        path: The folder.
        on_file: Told each file name before it is hashed, and each module before it is checked.

    Raises:
        ArtifactError: Names the first file or tensor that is wrong.
    """
    artifact = Artifact.open(path)
    artifact.check_hashes(on_file)
    if verifier := FORMATS[artifact.manifest.format].verifier:
        resolve_name(verifier)(artifact)
        return artifact
    checkpoint = artifact.checkpoint
    for name, tensor in checkpoint.tensors():
        if not all_finite(tensor):
            raise ArtifactError(f"{path}: tensor {name} has NaN or infinite entries")
    try:
        pattern = SparsityPattern.parse(artifact.manifest.pattern)
    except RecipeError as error:
        raise ArtifactError(f"{path / MANIFEST_FILE}: {error}") from error
    if (quantized := quantized_storage_of(artifact.manifest.format)) is not None:
        try:
            quantized.check_quantization(checkpoint, artifact.manifest.pruned)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error
    for module in artifact.manifest.pruned:
        on_file(module)
        _verify_module(artifact, checkpoint, module, pattern)
    return artifact


def _verify_module(
    artifact: Artifact, checkpoint: Checkpoint, module: str, pattern: SparsityPattern
) -> None:
    weight = artifact.pruned_weight(checkpoint, module)
    if not weight.is_floating_point():
        raise ArtifactError(f"{artifact.path}: {module}: dtype {weight.dtype} is not floating")
    if violation := pattern.first_violation(weight):
        raise ArtifactError(f"{artifact.path}: {module} is not {pattern}: {violation}")
    try:
        storage_of(artifact.manifest.format).check_weight(checkpoint, module, weight)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {module}: {error}") from error


def check_before_reading(folder: Path, *, verified: bool) -> None:
    """Check what a model is about to be read from: whole where asked, else as far as is quick.

    Args:
        folder: An artifact, or, where ``verified`` is false, any other model.
        verified: Whether to ``verify`` it, which reads it all; else sizes and names are checked.

    Raises:
        ArtifactError: It is damaged, incomplete or not alone, or has no hashes to verify.
    """
    if verified:
        verify(folder)
    elif (folder / MANIFEST_FILE).exists():
        Artifact.open(folder)
