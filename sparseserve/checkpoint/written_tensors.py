"""Whether a folder still holds the tensors that were written to it, no more and no less.

A program that loads a checkpoint may not notice: vLLM leaves a parameter of a quantized model as
it was in memory where no file has it, and reads every safetensors file of a folder without index.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Manifest
from sparseserve.checkpoint.tensors import Checkpoint, read_json
from sparseserve.errors import ArtifactError


def require_written_tensors(folder: Path) -> None:
    """Compare the tensors of ``folder`` with those that its manifest counts, by name.

    Only the headers of the files are read. A folder without a manifest is not of ours and passes;
    a manifest of a release that did not count tensors vouches for the sizes of the files only.

    Raises:
        ArtifactError: Names the first tensor that is missing or was added, or the first file of
            weights that was added, changed in size or is missing; or the manifest is damaged.
    """
    where = folder / MANIFEST_FILE
    if not where.is_file():
        return
    manifest = Manifest.from_json(read_json(where), where)
    listed = {name: entry for name, entry in manifest.files.items() if _holds_weights(name)}
    for file in sorted(path.name for path in folder.iterdir() if _holds_weights(path.name)):
        if file not in listed:
            raise ArtifactError(
                f"{folder / file}: not listed in {MANIFEST_FILE}, but would be read: remove it"
            )
    if manifest.tensors:
        _require_same(folder, set(Checkpoint.open(folder).files), set(manifest.tensors))
    for name, entry in listed.items():
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: listed in {MANIFEST_FILE}, but missing")
        if (size := (folder / name).stat().st_size) != entry.bytes:
            raise ArtifactError(
                f"{folder / name}: {size} bytes instead of {entry.bytes}: copy or export it again"
            )


def _require_same(folder: Path, found: Set[str], written: Set[str]) -> None:
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


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors")
