"""A child process: its log, its end, and whose code it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparseserve.serving.launch.child import Child, python_module


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_its_output_is_in_the_log_and_its_exit_code_is_told() -> None:
    with Child(
        python("import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)")
    ) as it:
        assert it.wait() == it.exit_code == 7
        assert it.last_words() == "two"


def test_the_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = f"print('first', flush=True); open({str(gate)!r}).read(); print('ValueError: second')"
    with Child(python(program)) as it:
        with gate.open("w"):
            assert it.last_words() in ("first", "none")
        assert it.wait() == 0
        assert it.first_error() == "ValueError: second"
        assert it.last_words() == "ValueError: second"


def test_its_log_can_be_a_file(tmp_path: Path) -> None:
    with Child(python("print('kept')"), log=tmp_path / "log") as it:
        it.wait()
    assert (tmp_path / "log").read_text() == "kept\n"


def test_its_answers_come_line_by_line_and_end_with_it() -> None:
    program = "import sys; print('a'); print('b'); print('noise', file=sys.stderr)"
    with Child(python(program), answers=True) as it:
        assert [it.answer(), it.answer(), it.answer()] == ["a", "b", ""]
        assert it.wait() == 0
        assert it.last_words() == "noise"


def test_stopped_it_leaves_none_of_its_own_children() -> None:
    program = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, "
        "flush=True); time.sleep(600)"
    )
    it = Child(python(program), answers=True)
    grandchild = int(it.answer())
    assert is_running(grandchild)
    it.stop()
    assert it.exit_code == -signal.SIGKILL
    wait_for_the_end(grandchild)


def test_asked_to_leave_it_may_tidy_up_first(tmp_path: Path) -> None:
    mark = tmp_path / "tidy"
    program = (
        "import signal, sys, time; "
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(mark)!r}, 'w'), sys.exit(3))); "
        "print('ready', flush=True); time.sleep(600)"
    )
    it = Child(python(program), answers=True)
    assert it.answer() == "ready"
    it.stop(patience=60)
    assert it.exit_code == 3
    assert mark.exists()


@pytest.mark.parametrize("orphaned", ["SIGKILL", "SIGTERM"])
def test_all_that_it_started_ends_with_a_parent_that_is_killed(
    orphaned: str,
) -> None:
    # The grandchild has a session of its own and takes no heed of being asked to leave; the child
    # is killed by the signal before it could end it.
    grandchild = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = (
        f"import subprocess, sys, time; it = subprocess.Popen([sys.executable, '-c', {grandchild!r}"
        "], start_new_session=True); print(it.pid, flush=True); time.sleep(600)"
    )
    program = (
        "import signal, sys; from sparseserve.serving.launch import child; "
        "child._ORPHAN_SECONDS = 1; "
        f"it = child.Child((sys.executable, '-c', {child!r}), answers=True, "
        f"orphaned=signal.{orphaned}); print(it.pid, it.answer(), flush=True); it.wait()"
    )
    parent = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    tree = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(tree) == 2
    assert all(is_running(pid) for pid in tree)
    parent.kill()
    parent.communicate()
    for pid in tree:
        wait_for_the_end(pid)


def test_what_a_server_started_ends_with_it() -> None:
    server = (
        "import subprocess, sys, time; it = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(600)'], start_new_session=True); print(it.pid, flush=True); "
        "time.sleep(600)"
    )
    program = (
        "import sys; from sparseserve.serving.launch import command; "
        "command._ENGINE_SECONDS = 1; "
        f"command.become(command.ServerCommand((sys.executable, '-c', {server!r}), {{}}))"
    )
    process = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    engine = int(process.stdout.readline())
    assert is_running(engine)
    process.kill()
    process.wait()
    wait_for_the_end(engine)
    process.stdout.close()


def test_a_watcher_leaves_with_the_child_that_it_watches_for() -> None:
    with Child(python("import os; print(os.environ['SPARSESERVE_TREE'])"), answers=True) as it:
        mark = it.answer()
        watchers = [pid for pid in processes() if mark in arguments_of(pid)]
        assert len(watchers) == 1
    assert not any(is_running(pid) for pid in watchers)


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def arguments_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def test_it_ends_with_a_parent_that_is_killed() -> None:
    program = (
        "import sys; from sparseserve.serving.launch.child import Child; "
        "it = Child((sys.executable, '-c', 'import time; time.sleep(600)')); "
        "print(it.pid, flush=True); it.wait()"
    )
    parent = subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.communicate()
    wait_for_the_end(child)


def test_the_code_of_the_current_folder_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("platform", "json", "sparseserve", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"print('trapped by {name}')")
    monkeypatch.chdir(tmp_path)
    with Child(python_module("platform"), answers=True) as it:
        assert "trapped" not in it.answer()
    # Nor by a Python that the child starts in its own way, as vLLM does.
    starts_another = (
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'json.tool', '--help'])"
    )
    with Child((sys.executable, "-P", "-c", starts_another), answers=True) as it:
        assert "trapped" not in it.answer()


@pytest.mark.parametrize("command", ["--version", "--help"])
def test_started_as_a_module_the_program_leaves_the_current_folder_alone(
    tmp_path: Path, command: str
) -> None:
    for name in ("click", "torch", "vllm", "difflib"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('trapped by {name}')")
    done = subprocess.run(
        [sys.executable, "-m", "sparseserve", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", ".", "--", "--no-such-option"],
        pytest.param(["tune", "."], marks=pytest.mark.further),
    ],
)
def test_serve_and_tune_run_no_code_of_the_model_folder_they_are_in(
    pair: tuple[Path, Path], tmp_path: Path, arguments: list[str]
) -> None:
    pytest.importorskip("vllm")
    packed, _ = pair
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    mark = tmp_path.parent / "mark"
    for name in ("vllm", "sparseserve", "torch", "uvloop", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')")
    done = subprocess.run(
        # As the command ``sparseserve`` starts, whose path begins with its own folder.
        [sys.executable, "-P", "-m", "sparseserve", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not mark.exists()
    if arguments[0] == "tune":
        assert done.returncode == 0, done.stderr
    else:
        assert "no-such-option" in done.stderr


def wait_for_the_end(pid: int) -> None:
    """Wait as long as the test may take: the system ends processes in its own time."""
    while is_running(pid):
        os.sched_yield()


def test_a_recorded_environment_reaches_it() -> None:
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    with Child(python(program), environment={"ADDED": "1"}, answers=True) as it:
        found = json.loads(it.answer())
    assert found["ADDED"] == found["PYTHONSAFEPATH"] == "1"
    assert found["PATH"] == os.environ["PATH"]
