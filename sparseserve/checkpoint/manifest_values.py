"""Types of the values in a manifest: its digest says who wrote it, not that they can be used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparseserve.checkpoint.weight_files import plain_relative
from sparseserve.errors import ArtifactError
from sparseserve.paths import shown, shown_value

_TEXTS = ("pattern", "source")
_LISTS_OF_NAMES = ("pruned", "transposed", "tensors")
_OBJECTS = ("recipe", "calibration", "report", "files", "stacks")


def check_manifest_values(where: Path, body: Mapping[str, object]) -> None:
    """Refuse a manifest with a value of another type than its key has; missing keys are no matter.

    Args:
        where: Its file, for messages.
        body: What it says.

    Raises:
        ArtifactError: Names the key and the value.
    """
    for keys, kind, wanted in ((_TEXTS, str, "a text"), (_OBJECTS, dict, "an object")):
        for key in keys:
            if key in body and not isinstance(body[key], kind):
                raise _wrong(where, key, body[key], wanted)
    for key in _LISTS_OF_NAMES:
        if key in body and not _is_list_of_names(body[key]):
            raise _wrong(where, key, body[key], "a list of names")
    files = body.get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        _check_file(where, name, entry)


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_file(where: Path, name: str, entry: object) -> None:
    if not plain_relative(name):
        raise ArtifactError(
            f"{where}: lists {shown(name)}, which can be no file of the folder: export it again"
        )
    size = entry.get("bytes") if isinstance(entry, dict) else None
    whole = isinstance(size, int) and not isinstance(size, bool)
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or not whole:
        raise _wrong(where, f"files {name}", entry, "an object with a sha256 and bytes")


def _wrong(where: Path, key: str, value: object, wanted: str) -> ArtifactError:
    return ArtifactError(
        f"{where}: {key} is {shown_value(value)}, but must be {wanted}: export it again"
    )
