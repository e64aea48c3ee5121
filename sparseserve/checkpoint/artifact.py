"""A pruned checkpoint on disk: the one hand-over between pruning, exporting and serving.

A folder with safetensors shards, the model's own configuration and tokenizer files, and
``sparseserve.json``: what was done, to what, with which result, and the sha256 of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparseserve.checkpoint.manifest_values import check_manifest_values
from sparseserve.checkpoint.tensors import Checkpoint, all_finite, read_json, write_json
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.sparsity import Packed24, SparsityPattern, pack24, unpack24

MANIFEST_FILE = "sparseserve.json"
MANIFEST_VERSION = 1
Format = Literal["dense", "packed24"]
_DIGEST_KEY = "manifest_sha256"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a file must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``sparseserve.json``.

    Attributes:
        format: How pruned weights are stored.
        pattern: The pattern they obey, as ``SparsityPattern.parse`` reads it.
        pruned: Full names of the pruned linear modules.
        transposed: Those of them whose dense weight is stored ``[in, out]`` (GPT-2's Conv1D).
        source: The model that was pruned.
        recipe: What was asked for, as JSON data.
        calibration: Which text was used, by name and hash, as JSON data.
        report: What happened, as JSON data.
        files: Every other file of the folder.
        tensors: Names of all tensors in the files; empty in manifests of releases before this key.
    """

    format: Format
    pattern: str
    pruned: tuple[str, ...]
    transposed: tuple[str, ...]
    source: str
    recipe: dict[str, object]
    calibration: dict[str, Any]
    report: dict[str, Any]
    files: dict[str, FileEntry]
    version: int = MANIFEST_VERSION
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return JSON data with a digest of itself, so that no byte can change unnoticed."""
        data = asdict(self)
        return {**data, _DIGEST_KEY: _digest(data)}

    @classmethod
    def from_json(cls, data: dict[str, object], where: Path) -> Manifest:
        """Read back and check what ``to_json`` wrote.

        Raises:
            ArtifactError: A key is missing, of another version or of a wrong type, or the digest
                differs.
        """
        body = {key: value for key, value in data.items() if key != _DIGEST_KEY}
        version, kind = body.get("version"), body.get("format")
        if version != MANIFEST_VERSION:
            raise ArtifactError(
                f"{where}: version {version!r} is not {MANIFEST_VERSION}: "
                "use the sparseserve release that wrote it"
            )
        if kind not in get_args(Format):
            raise ArtifactError(f"{where}: format {kind!r} is not one of {get_args(Format)}")
        if data.get(_DIGEST_KEY) != _digest(body):
            raise ArtifactError(f"{where}: was changed after it was written (digest differs)")
        check_manifest_values(where, body)
        files = body.pop("files", None)
        if not isinstance(files, dict):
            raise ArtifactError(f"{where}: has no list of files")
        try:
            entries = {name: FileEntry(**entry) for name, entry in files.items()}
            fixed = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in body.items()
            }
            return cls(**fixed, files=entries)  # type: ignore[arg-type]  # the digest vouches for the types
        except TypeError as error:
            raise ArtifactError(f"{where}: a key is missing or unknown: {error}") from error


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest and check that every file is there in its full size.

        Raises:
            ArtifactError: There is no manifest, or a file is missing or has another size.
        """
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such folder")
        if not (path / MANIFEST_FILE).exists():
            raise ArtifactError(f"{path}: not a sparseserve checkpoint, it has no {MANIFEST_FILE}")
        where = path / MANIFEST_FILE
        manifest = Manifest.from_json(read_json(where), where)
        for name, entry in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise ArtifactError(f"{file}: listed in {MANIFEST_FILE}, but missing")
            if (size := file.stat().st_size) != entry.bytes:
                raise ArtifactError(
                    f"{file}: {size} bytes instead of {entry.bytes}: copy or export it again"
                )
        return cls(path, manifest)

    @property
    def checkpoint(self) -> Checkpoint:
        """The tensors."""
        return Checkpoint.open(self.path)

    def pruned_weight(self, checkpoint: Checkpoint, module: str) -> Tensor:
        """Read the dense ``[out, in]`` weight of a pruned module, whatever the format."""
        if self.manifest.format == "packed24":
            try:
                return unpack24(_packed(checkpoint, module))
            except ArtifactError as error:
                raise ArtifactError(f"{self.path}: {module}: {error}") from error
        weight = checkpoint.tensor(f"{module}.weight")
        return weight.T if module in self.manifest.transposed else weight


def write_manifest(folder: Path, manifest: Manifest) -> Artifact:
    """Hash every file of ``folder`` and write ``sparseserve.json`` beside them."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE
    )
    files = {
        name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
        for name in names
    }
    tensors = tuple(sorted(Checkpoint.open(folder).files))
    counted = replace(manifest, files=files, tensors=tensors)
    write_json(folder / MANIFEST_FILE, counted.to_json())
    return Artifact.open(folder)


def verify(path: Path, on_file: Callable[[str], None] = lambda name: None) -> Artifact:
    """Check a checkpoint byte by byte and tensor by tensor.

    Every file has its hash, no weight file is unlisted, every tensor is finite, every pruned
    weight obeys the pattern, and every packed one has its one canonical encoding.

    Args:
        path: The folder.
        on_file: Told each file name before it is hashed, and each module before it is checked.

    Raises:
        ArtifactError: Names the first file or tensor that is wrong.
    """
    artifact = Artifact.open(path)
    for name, entry in artifact.manifest.files.items():
        on_file(name)
        if file_sha256(path / name) != entry.sha256:
            raise ArtifactError(f"{path / name}: sha256 differs from {MANIFEST_FILE}: file changed")
    for file in path.glob("*.safetensors"):
        if file.name not in artifact.manifest.files:
            raise ArtifactError(f"{file}: not listed in {MANIFEST_FILE}: remove it")
    checkpoint = artifact.checkpoint
    for name, tensor in checkpoint.tensors():
        if not all_finite(tensor):
            raise ArtifactError(f"{path}: tensor {name} has NaN or infinite entries")
    try:
        pattern = SparsityPattern.parse(artifact.manifest.pattern)
    except RecipeError as error:
        raise ArtifactError(f"{path / MANIFEST_FILE}: {error}") from error
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
    if artifact.manifest.format == "packed24":
        stored, canonical = _packed(checkpoint, module), pack24(weight)
        same_values = _bits(stored.values).equal(_bits(canonical.values))
        if not same_values or not stored.indices.equal(canonical.indices):
            raise ArtifactError(f"{artifact.path}: {module}: encoding is not the canonical one")


def _packed(checkpoint: Checkpoint, module: str) -> Packed24:
    return Packed24(
        checkpoint.tensor(f"{module}.weight_values"), checkpoint.tensor(f"{module}.weight_indices")
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: dict[str, object]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
