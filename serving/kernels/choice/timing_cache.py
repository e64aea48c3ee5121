"""Measured kernel times on disk: one JSON file for each device and set of library versions.

It lies in ``$SPARSESERVE_CACHE_DIR``, else in ``sparseserve`` of the user's cache folder. A file
that cannot be read or was made elsewhere is ignored with a message, and replaced by the next
measurement. It can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import write_json
from sparseserve.errors import ArtifactError
from sparseserve.serving.kernels.choice.plan import BATCHES, KernelTimes

_VERSION = 1


@dataclass(frozen=True, slots=True)
class TimingCache:
    """The times measured on one device.

    Attributes:
        path: The file.
        identity: All that times depend on but the layer: device, threads, versions.
    """

    path: Path
    identity: Mapping[str, str]

    @classmethod
    def of(cls, identity: Mapping[str, str]) -> TimingCache:
        """Return the cache of the user for the machine that ``identity`` describes."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return cls(cache_folder() / "kernel-times" / f"{digest[:16]}.json", identity)

    def load(self) -> dict[str, tuple[KernelTimes, ...]]:
        """Return the times by layer; nothing where there is no file yet.

        Raises:
            ArtifactError: The file is damaged or was made on another machine.
        """
        if not self.path.exists():
            return {}
        stored = read_json(self.path)
        if stored.get("version") != _VERSION or stored.get("identity") != dict(self.identity):
            raise ArtifactError(f"{self.path}: kernel times of another machine or release")
        layers = stored.get("layers")
        try:
            return {layer: tuple(map(_times, _table(layers)[layer])) for layer in _table(layers)}
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.path}: damaged kernel times: {error!r}") from error

    def store(self, layer: str, times: tuple[KernelTimes, ...]) -> None:
        """Add the times of one layer to what is there by now, or start anew if that is damaged.

        Raises:
            ArtifactError: The disk is full or not writable.
        """
        try:
            layers = self.load()
        except ArtifactError:
            layers = {}
        layers[layer] = times
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{self.path.parent}: cannot be made: {error}") from error
        write_json(
            self.path,
            {
                "version": _VERSION,
                "identity": dict(self.identity),
                "layers": {
                    name: [asdict(found) for found in all_] for name, all_ in layers.items()
                },
            },
        )


def cache_folder() -> Path:
    """Return where what can be measured again is kept."""
    if own := os.environ.get("SPARSESERVE_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseserve"


def _times(stored: object) -> KernelTimes:
    data = _table(stored)
    seconds = {int(batch): float(value) for batch, value in _table(data["seconds"]).items()}
    if set(seconds) - set(BATCHES) or not all(0 < value < math.inf for value in seconds.values()):
        raise ValueError(f"seconds {seconds}")
    return KernelTimes(
        kernel=str(data["kernel"]),
        layout=str(data["layout"]),
        packed_bytes=int(data["packed_bytes"]),
        seconds=seconds,
    )


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where a table should be")
    return value
