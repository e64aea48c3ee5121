"""A pruned checkpoint on disk: the one hand-over between pruning, exporting and serving.

A folder with safetensors shards, the model's own configuration and tokenizer files, and
``sparseserve.json``: what was done, to what, with which result, and the sha256 of every file.
Only the model card, README.md, has none: its readers are people, and who publishes it edits it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.manifest_values import check_manifest_values
from sparseserve.checkpoint.stacks import ExpertStack, stacks_from_json, stacks_to_json
from sparseserve.checkpoint.storage import storage_of
from sparseserve.checkpoint.tensors import Checkpoint, partial_of, write_json, writing
from sparseserve.checkpoint.weight_files import unlisted_files
from sparseserve.errors import ArtifactError

MANIFEST_FILE = "sparseserve.json"
MANIFEST_VERSION = 1
CARD_FILE = "README.md"
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
        format: How pruned weights are stored, a name of ``FORMATS``.
        pattern: The pattern they obey, as ``SparsityPattern.parse`` reads it.
        pruned: Full names of the pruned linear modules, as the checkpoint's tensors have them.
        transposed: Those of them whose dense weight is stored ``[in, out]`` (GPT-2's Conv1D).
        source: The model that was pruned.
        recipe: What was asked for, as JSON data.
        calibration: Which text was used, by name and hash, as JSON data.
        report: What happened, as JSON data.
        files: Every other file of the folder but CARD_FILE.
        tensors: Names of all tensors in the files; empty in manifests of releases before this key.
        stacks: Tensors of the dense checkpoint that hold pruned experts, whose names are those that
            a stack gives them.
    """

    format: str
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
    stacks: tuple[ExpertStack, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return JSON data with a digest of itself, so that no byte can change unnoticed."""
        data = {**asdict(self), "stacks": stacks_to_json(self.stacks)}
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
        if not isinstance(kind, str) or kind not in FORMATS:
            raise ArtifactError(f"{where}: format {kind!r} is not one of {', '.join(FORMATS)}")
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
            fixed["stacks"] = stacks_from_json(where, fixed.get("stacks", {}))
            return cls(**fixed, files=entries)  # type: ignore[arg-type]  # the digest vouches for the types
        except TypeError as error:
            raise ArtifactError(f"{where}: a key is missing or unknown: {error}") from error


@dataclass(frozen=True, slots=True)
class PartOfWeight:
    """A stored tensor that is all or part of the weight of a pruned ``module``.

    Of several, one ``stands_for_all``, so that whoever goes through the tensors meets each weight
    once.
    """

    module: str
    stands_for_all: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest, and check that every file and tensor it counts is there, and no other.

        Of the files, only sizes and the headers of the shards are read: hashes are compared by
        ``check_hashes`` and ``verify``.

        Raises:
            ArtifactError: There is no manifest, a file is missing or has another size, there is a
                file that a program might read though the manifest does not list it, or a tensor is
                missing or was added.
        """
        if not path.is_dir():
            raise ArtifactError(f"{path}: no such folder")
        if not (path / MANIFEST_FILE).exists():
            raise ArtifactError(f"{path}: not a sparseserve checkpoint, it has no {MANIFEST_FILE}")
        where = path / MANIFEST_FILE
        manifest = Manifest.from_json(read_json(where), where)
        _require_listed_files(path, manifest)
        if manifest.tensors:
            _require_same_tensors(path, set(Checkpoint.open(path).files), set(manifest.tensors))
        for name, entry in manifest.files.items():
            if (size := (path / name).stat().st_size) != entry.bytes:
                raise ArtifactError(
                    f"{path / name}: {size} bytes instead of {entry.bytes}: copy or export it again"
                )
        return cls(path, manifest)

    def check_hashes(self, on_file: Callable[[str], None] = lambda name: None) -> None:
        """Compare every file with its hash; ``on_file`` is told each name before it is read.

        Raises:
            ArtifactError: Names the first file that was changed.
        """
        for name, entry in self.manifest.files.items():
            on_file(name)
            if file_sha256(self.path / name) != entry.sha256:
                raise ArtifactError(
                    f"{self.path / name}: sha256 differs from {MANIFEST_FILE}: file changed since "
                    "it was written, so copy or make it again"
                )

    @property
    def checkpoint(self) -> Checkpoint:
        """The tensors.

        Raises:
            ArtifactError: It is made for other programs, and holds none that are read here.
        """
        storage_of(self.manifest.format)
        return Checkpoint.open(self.path)

    @property
    def weight_bytes(self) -> int:
        """Size of the weights on disk; of what is made for other programs, of all files."""
        if FORMATS[self.manifest.format].storage is not None:
            return self.checkpoint.weight_bytes
        return sum(entry.bytes for entry in self.manifest.files.values())

    def parts(self, checkpoint: Checkpoint) -> dict[str, PartOfWeight]:
        """Return which stored tensors are parts of pruned weights, by name."""
        storage = storage_of(self.manifest.format)
        return {
            name: PartOfWeight(module, stands_for_all=number == 0)
            for module in self.manifest.pruned
            for number, name in enumerate(storage.names(checkpoint, module))
        }

    def pruned_weight(self, checkpoint: Checkpoint, module: str) -> Tensor:
        """Read the dense ``[out, in]`` weight of a pruned module, whatever the format.

        A quantised one is float32: code times scale.

        Raises:
            ArtifactError: Names the module, and what is missing or damaged.
        """
        storage = storage_of(self.manifest.format)
        transposed = module in self.manifest.transposed
        try:
            if (stack := self._stack_of(checkpoint, module)) is not None:
                expert, projection = stack.place(module)
                return stack.weight(checkpoint.row(stack.tensor, expert)[None], 0, projection)
            return storage.read_weight(checkpoint, module, transposed=transposed)
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {module}: {error}") from error

    def _stack_of(self, checkpoint: Checkpoint, module: str) -> ExpertStack | None:
        """Return the stored stack that holds ``module``."""
        return next(
            (
                stack
                for stack in self.manifest.stacks
                if stack.tensor in checkpoint and stack.holds(module)
            ),
            None,
        )


def write_manifest(folder: Path, manifest: Manifest) -> Artifact:
    """Hash every file of ``folder`` but its card and write ``sparseserve.json`` beside them.

    A folder may be finished again, after a process died while it wrote its manifest or its card.

    Raises:
        ArtifactError: The disk is full or not writable.
    """
    for name in (MANIFEST_FILE, CARD_FILE):
        with writing(folder / name):
            partial_of(folder / name).unlink(missing_ok=True)
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE and path != folder / CARD_FILE
    )
    files = {
        name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
        for name in names
    }
    is_checkpoint = FORMATS[manifest.format].storage is not None
    tensors = tuple(sorted(Checkpoint.open(folder).files)) if is_checkpoint else ()
    counted = replace(manifest, files=files, tensors=tensors)
    write_json(folder / MANIFEST_FILE, counted.to_json())
    return Artifact.open(folder)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_listed_files(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: listed in {MANIFEST_FILE}, but missing")
    for name in unlisted_files(folder, frozenset({*manifest.files, MANIFEST_FILE})):
        raise ArtifactError(
            f"{folder / name}: not listed in {MANIFEST_FILE}, though a program that opens the "
            "folder might read it: remove it"
        )


def _require_same_tensors(folder: Path, found: Set[str], written: Set[str]) -> None:
    # vLLM leaves a parameter of a quantized model as it was in memory where no file has it.
    if missing := sorted(written - found):
        raise ArtifactError(
            f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(written)} are): "
            "copy or export it again"
        )
    if surplus := sorted(found - written):
        raise ArtifactError(
            f"{folder}: tensor {surplus[0]} was added after the checkpoint was written "
            f"({len(surplus)} were): copy or export it again"
        )


def _digest(data: dict[str, object]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
