"""JSON objects on disk, read within bounds."""

from __future__ import annotations

import json
from pathlib import Path

from sparseserve.errors import ArtifactError, SparseServeError, first_line

# The index of the largest published model takes 10 MiB.
LARGEST_JSON = 256 * 2**20


def read_json(path: Path, error: type[SparseServeError] = ArtifactError) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        SparseServeError: Of the type ``error``: the file is missing, is no plain file, is larger
            than LARGEST_JSON bytes, or is not a JSON object.
    """
    if not path.exists():
        raise error(f"{path}: no such file")
    if not path.is_file():  # a pipe without a writer would never end
        raise error(f"{path}: is not a plain file")
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise error(
            f"{path}: has {size:,} bytes, more than the {LARGEST_JSON:,} that are read as JSON: "
            "copy or download it again"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: cannot be read as JSON: {first_line(reason)}") from reason
    if not isinstance(data, dict):
        raise error(f"{path}: is not a JSON object")
    return data
