"""Where a result appears, and the folder beside or inside it where it is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.json_file import read_json
from sparseserve.errors import ArtifactError, first_line

STATE_FILE = "run.json"
# The folder of the run, where the output is an empty folder that must stay: a volume, perhaps.
_INSIDE = ".sparseserve-partial"
# What every new ext4 volume holds.
_NOT_CONTENT = {_INSIDE, "lost+found"}


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """An output folder that a run may fill.

    Attributes:
        out: The output, with links followed.
        partial: The folder of the unfinished run.
        inside: Whether ``out`` is there already: the result is then moved into it, file by file.
            Otherwise it appears by one rename.
    """

    out: Path
    partial: Path
    inside: bool

    @classmethod
    def of(cls, out: Path) -> OutputPlace:
        """Find the place of ``out`` and check that a result can appear there; change nothing.

        Raises:
            ArtifactError: It is a file, not empty, a link to nothing, in a folder that cannot be
                written, or in a checkpoint; or an unfinished run is in the way.
        """
        try:
            return cls._of(out)
        except (OSError, RuntimeError, ValueError) as error:
            raise ArtifactError(
                f"{out}: cannot be an output folder ({first_line(error)}): choose another"
            ) from error

    @classmethod
    def _of(cls, out: Path) -> OutputPlace:
        if out.is_symlink() and not out.exists():
            raise ArtifactError(
                f"{out}: is a link to {os.readlink(out)}, which does not exist: make that folder "
                "or remove the link"
            )
        real = out.resolve()
        refuse_inside_checkpoint(out)
        beside = cls(real, real.with_name(f"{real.name}.partial"), False) if real.name else None
        if not real.exists():
            assert beside is not None, "the root of a file system exists"
            beside._require_writable(out)
            return beside
        if beside is not None and beside.published is not None:
            return beside
        inside = cls(real, real / _INSIDE, True)
        if not real.is_dir() or (inside.published is None and inside.content()):
            raise not_empty(out)
        if beside is not None and beside.begun:
            raise ArtifactError(
                f"{out}: was made while {beside.partial} holds the unfinished run: remove the "
                "empty folder to go on with that run, or the other one to begin anew"
            )
        inside._require_writable(out)
        return inside

    @property
    def begun(self) -> bool:
        """Whether an unfinished run is here."""
        return (self.partial / STATE_FILE).exists()

    @property
    def published(self) -> str | None:
        """The folder of the run that was being moved to the output when the process died."""
        if not self.begun:
            return None
        name = read_json(self.partial / STATE_FILE).get("publishing")
        return name if isinstance(name, str) else None

    def content(self) -> list[str]:
        """Return the names in the output that count as its content."""
        if not self.out.exists():
            return []
        return sorted({path.name for path in self.out.iterdir()} - _NOT_CONTENT)

    def _require_writable(self, named: Path) -> None:
        """Refuse a place whose nearest folder cannot be written, or is none."""
        self.partial.exists()  # raises where the name of the run's folder is too long
        parents = self.partial.parents
        nearest = next(path for path in parents if path.exists() or path.is_symlink())
        if not nearest.is_dir():
            raise ArtifactError(f"{named}: {nearest} is not a folder: choose another output folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ArtifactError(
                f"{named}: {nearest} cannot be written: change its permissions or choose another "
                "output folder"
            )


def leftovers(out: Path) -> list[Path]:
    """Return the folders of runs beside and inside ``out`` that exist."""
    try:
        real = out.resolve()
        found = [real / _INSIDE]
        if real.name:
            found.append(real.with_name(f"{real.name}.partial"))
        return [path for path in found if path.is_dir() and not path.is_symlink()]
    except (OSError, RuntimeError):
        return []  # not even a path: who asks for its place is told


def refuse_inside_checkpoint(path: Path) -> None:
    """Refuse a place inside a checkpoint of ours: it is damaged by files its manifest lacks.

    Raises:
        ArtifactError: Names the checkpoint.
    """
    for folder in path.resolve().parents:
        if (folder / MANIFEST_FILE).exists():
            raise ArtifactError(
                f"{path}: lies in the checkpoint {folder}, which further files would make unusable "
                "(its manifest does not list them): choose a place outside of it"
            )


def not_empty(out: Path) -> ArtifactError:
    """Return the refusal of an output that already holds something."""
    return ArtifactError(f"{out}: exists and is not empty: choose another output folder")
