"""The folder of an unfinished run: it lets a killed run go on, and keeps two from mixing.

``OUT.partial/`` is locked by the process that works in it. It holds the fingerprint of the run,
what is finished of it, and the checkpoint being built, which becomes ``OUT`` by a rename at the
very end: ``OUT`` is whole or absent. An ``OUT`` that is there already and empty, such as the mount
point of a volume, stays what it is: the folder of the run is then ``OUT/.sparseserve-partial``, and
the finished files are moved up, the manifest last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.folder_lock import LOCK_FILE, locked, refuse_locked
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.output_place import STATE_FILE, OutputPlace, leftovers, not_empty
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.errors import ArtifactError

# What runs of any release leave when they die before or after the file of their state exists.
_OURS = {LOCK_FILE, f"{STATE_FILE}.tmp", "layers", "hidden", "predictions", *FORMATS}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Everything that decides the bytes of a result.

    Attributes:
        parts: Name and value of each thing.
    """

    parts: Mapping[str, str]

    def differences(self, other: object) -> list[str]:
        """Return the names of the parts that ``other``, read from JSON, has not or has not so."""
        stored = other if isinstance(other, dict) else {}
        names = {*self.parts, *stored}
        return sorted(name for name in names if self.parts.get(name) != stored.get(name))


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run, locked by this process."""

    place: OutputPlace

    @classmethod
    @contextmanager
    def claim(cls, out: Path) -> Iterator[RunFolder]:
        """Hold the folder of the run that will end in ``out`` while the block runs.

        A run that was never begun leaves nothing behind.

        Raises:
            ArtifactError: ``out`` cannot be filled, or another process is working on it.
        """
        place = _free(out)
        _refuse_foreign(place)  # before a lock makes the folder look like one of ours
        missing = [path for path in place.partial.parents if not path.exists()]
        with locked(place.partial):
            try:
                # What was true before the lock was held may have been changed by its holder.
                if OutputPlace.of(out) != place:
                    raise not_empty(out)
                yield cls(place)
            finally:
                _abandon(place, missing)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.place.partial

    @property
    def out(self) -> Path:
        """Where the result will appear."""
        return self.place.out

    def begin(self, fingerprint: Fingerprint) -> bool:
        """Start the run of this ``fingerprint``, or go on with it.

        Returns:
            Whether it had been finished: the process died while it moved the result to the output.
            That is done now.

        Raises:
            ArtifactError: The folder holds another run, or something else.
        """
        refuse_other_run(self.place, fingerprint)
        if name := self.place.published:
            self._move(name)
            return True
        if not self.place.begun:
            with writing(self.path):
                _clear(self.path)  # of a run that died before it had begun: of unknown settings
            self._write_state(fingerprint.parts, publishing=None)
        return False

    def fresh(self, name: str) -> Path:
        """Return the path of a new subfolder, removing what an earlier attempt left there."""
        folder = self.path / name
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def publish(self, folder: Path) -> None:
        """Move the finished ``folder``, one of this run, to the output and remove the rest.

        Raises:
            ArtifactError: The output was filled meanwhile, or cannot be written.
        """
        if self.place.content() or self.place.inside != self.out.exists():
            raise not_empty(self.out)
        parts = read_json(self.path / STATE_FILE)["fingerprint"]
        assert isinstance(parts, dict)
        self._write_state(parts, publishing=folder.name)
        self._move(folder.name)

    def _write_state(self, parts: Mapping[str, str], publishing: str | None) -> None:
        state = {"fingerprint": dict(parts), "publishing": publishing}
        write_json(self.path / STATE_FILE, state)

    def _move(self, name: str) -> None:
        """Move the result to the output, as far as that is not done yet, and clear the run."""
        folder = self.path / name
        with writing(self.out):
            if self.place.inside and folder.exists():
                # Without its manifest a folder is no checkpoint of ours, so that one comes last.
                for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
                    path.rename(self.out / path.name)
            elif folder.exists():
                folder.rename(self.out)
            _clear(self.path)
        (self.path / STATE_FILE).unlink()


def check_output(out: Path) -> OutputPlace:
    """Return the place of ``out`` as ``RunFolder.claim`` would find it; change nothing.

    Raises:
        ArtifactError: ``claim`` would raise it.
    """
    place = OutputPlace.of(out)
    refuse_locked(place.partial)
    return place


def refuse_busy(out: Path) -> None:
    """Refuse an output that another process is filling; change nothing.

    Raises:
        ArtifactError: Names the process.
    """
    for folder in leftovers(out):
        refuse_locked(folder)


def refuse_other_run(place: OutputPlace, fingerprint: Fingerprint) -> None:
    """Refuse a place that holds an unfinished run of another ``fingerprint``; change nothing.

    Raises:
        ArtifactError: Names what differs.
    """
    folder = place.partial
    if not place.begun:
        _refuse_foreign(place)
        return
    other = fingerprint.differences(read_json(folder / STATE_FILE).get("fingerprint"))
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ArtifactError(
            f"{folder}: holds an unfinished run with another model, recipe or calibration "
            f"(different: {', '.join(other[:3])}{more}): remove it, or repeat the command that "
            "began it"
        )


def _refuse_foreign(place: OutputPlace) -> None:
    """Refuse a place where something lies that no run has left.

    Raises:
        ArtifactError: Names the first of it.
    """
    folder = place.partial
    if not place.begun and (foreign := sorted(_names(folder) - _left_by_a_run(folder))):
        raise ArtifactError(
            f"{folder}: exists, but is no unfinished run (it holds {foreign[0]}): "
            "remove it or choose another output folder"
        )


def _left_by_a_run(folder: Path) -> set[str]:
    """Return the names in ``folder``, of no known state, that are ours to remove.

    A run locks its folder before it makes anything there. Without a lock, a folder called dense is
    somebody's own.
    """
    return _names(folder) & _OURS if (folder / LOCK_FILE).is_file() else set()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def _free(out: Path) -> OutputPlace:
    """Return the place of ``out``; where that is filled, remove what its finished run left."""
    try:
        return OutputPlace.of(out)
    except ArtifactError:
        for folder in leftovers(out) if out.exists() else []:
            if (left := _left_by_a_run(folder)) and left == _names(folder):
                with locked(folder):
                    _abandon(OutputPlace(out, folder, False), [], clear=True)
        raise


def _clear(folder: Path) -> None:
    """Remove everything in ``folder`` but its lock and its state, which goes last."""
    for path in folder.iterdir():
        if path.name not in {LOCK_FILE, STATE_FILE}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _abandon(place: OutputPlace, made: list[Path], *, clear: bool = False) -> None:
    """Remove the folder of a run that has ended or was never begun, and the parents ``made``."""
    if place.begun or not place.partial.exists():
        return
    if clear:
        _clear(place.partial)
    if {path.name for path in place.partial.iterdir()} <= {LOCK_FILE}:
        (place.partial / LOCK_FILE).unlink(missing_ok=True)
        _remove_empty([place.partial, *([] if place.out.exists() else made)])


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # another process has begun to use it
