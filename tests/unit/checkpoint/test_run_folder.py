"""One process at a time fills an output, and a run that goes on is the run that was begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.folder_lock import LOCK_FILE, locked, refuse_locked
from sparseserve.checkpoint.output_place import STATE_FILE
from sparseserve.checkpoint.run_folder import Fingerprint, RunFolder, check_output
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.errors import ArtifactError

RUN = Fingerprint({"model": "a", "recipe": "b"})
HOLDER = """
import sys, time
from pathlib import Path
from sparseserve.checkpoint.folder_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def begin(out: Path, fingerprint: Fingerprint = RUN, result: str | None = None) -> None:
    with RunFolder.claim(out) as run:
        run.begin(fingerprint)
        if result is not None:
            folder = run.fresh("dense")
            folder.mkdir()
            (folder / "model").write_text(result)
            run.publish(folder)


def test_a_result_appears_and_nothing_else_is_left(tmp_path: Path) -> None:
    begin(tmp_path / "new" / "out", result="weights")
    assert (tmp_path / "new" / "out" / "model").read_text() == "weights"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_run_that_never_began_leaves_not_even_its_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunFolder.claim(tmp_path / "new" / "deep" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_works_in_the_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        named = rf"out\.partial: another process \(process {holder.pid}\) is working in it"
        with pytest.raises(ArtifactError, match=named):
            begin(tmp_path / "out")
        with pytest.raises(ArtifactError, match=named):
            check_output(tmp_path / "out")
        holder.kill()
    # The system has released the lock of the dead process; its file is no obstacle.
    assert (folder / LOCK_FILE).exists()
    begin(tmp_path / "out", result="mine")


def test_asking_for_a_lock_leaves_no_trace(tmp_path: Path) -> None:
    refuse_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_held_by_one_at_a_time_also_within_a_process(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a"),
        locked(tmp_path / "b"),
        pytest.raises(ArtifactError, match=str(os.getpid())),
        locked(tmp_path / "a"),
    ):
        pass


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"model": "a", "recipe": "other"}, "different: recipe"),
        ({"model": "a"}, "different: recipe"),
        ({"model": "a", "recipe": "b", "tokenizer.json": "c"}, "different: tokenizer.json"),
    ],
)
def test_a_run_of_another_fingerprint_is_refused_and_kept(
    tmp_path: Path, parts: dict[str, str], named: str
) -> None:
    out = tmp_path / "out"
    begin(out)
    kept = (tmp_path / "out.partial" / STATE_FILE).read_bytes()
    with pytest.raises(ArtifactError, match=named):
        begin(out, Fingerprint(parts))
    assert (tmp_path / "out.partial" / STATE_FILE).read_bytes() == kept
    begin(out, result="the same again")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"no unfinished run \(it holds thesis\.txt\)"):
        begin(tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("name", ["dense", "onnx", "layers", "hidden"])
def test_a_folder_of_somebody_else_is_left_alone_whatever_it_is_called(
    tmp_path: Path, name: str, *, filled: bool
) -> None:
    """Twice: the first refusal must leave nothing that makes the folder look like one of ours."""
    precious = tmp_path / "out.partial" / name / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    if filled:
        begin(tmp_path / "elsewhere", result="weights")
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(ArtifactError, match="not empty" if filled else rf"holds {name}\)"):
            begin(tmp_path / "out")
        assert precious.read_text() == "precious"
        assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [name]


def test_a_place_inside_a_checkpoint_is_refused_also_through_a_link(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "empty").mkdir(parents=True)
    (checkpoint / MANIFEST_FILE).write_text("{}")
    (tmp_path / "link").symlink_to(checkpoint)
    before = sorted(checkpoint.rglob("*"))
    for out in (checkpoint / "out", checkpoint / "empty", tmp_path / "link" / "a" / "b"):
        for ask in (begin, check_output):
            with pytest.raises(ArtifactError, match=f"lies in the checkpoint {checkpoint},"):
                ask(out)
    assert sorted(checkpoint.rglob("*")) == before


def test_an_empty_folder_such_as_a_mount_point_is_filled_and_stays_itself(tmp_path: Path) -> None:
    out = tmp_path / "volume"
    out.mkdir()
    (out / "lost+found").mkdir()
    before = out.stat().st_ino
    begin(out, result="weights")
    assert out.stat().st_ino == before
    assert sorted(path.name for path in out.iterdir()) == ["lost+found", "model"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    begin(tmp_path / "link", result="weights")
    assert (tmp_path / "real" / "model").read_text() == "weights"
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_nothing_a_file_and_a_file_as_parent_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("data")
    with pytest.raises(ArtifactError, match="nowhere, which does not exist"):
        begin(tmp_path / "dangling")
    with pytest.raises(ArtifactError, match="file: exists and is not empty"):
        begin(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot be an output folder|is not a folder"):
        begin(tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("there", [False, True])
def test_a_process_that_dies_while_it_moves_the_result_is_completed(
    tmp_path: Path, there: bool
) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with RunFolder.claim(out) as run:
        run.begin(RUN)
        folder = run.fresh("dense")
        folder.mkdir()
        (folder / "model").write_text("weights")
        state = run.path / STATE_FILE
        state.write_text(json.dumps({**json.loads(state.read_text()), "publishing": "dense"}))
    with RunFolder.claim(out) as run:
        assert run.begin(RUN)
    assert (out / "model").read_text() == "weights"
    assert [path.name for path in out.iterdir()] == ["model"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_finished_run_left_goes_when_the_command_is_given_again(tmp_path: Path) -> None:
    begin(tmp_path / "out", result="weights")
    left = tmp_path / "out.partial"
    (left / "layers").mkdir(parents=True)
    (left / LOCK_FILE).touch()
    with pytest.raises(ArtifactError, match="out: exists and is not empty"):
        begin(tmp_path / "out")
    assert not left.exists()


@pytest.mark.parametrize("change", ['{"a": 2}', "[", '{"sha256": "0", "data": {"a": 1}}', ""])
def test_a_sealed_file_that_was_changed_is_not_believed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "sealed.json"
    assert read_sealed(path) is None
    write_sealed(path, {"a": 1})
    assert read_sealed(path) == {"a": 1}
    path.write_text(change)
    assert read_sealed(path) is None
