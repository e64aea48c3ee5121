"""What this machine has, and what is given back to it."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from sparseserve import machine
from sparseserve.machine import give_back_freed_memory, this_machine

MIB = 2**20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a machine with 100 MiB free, of which this process is in none."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 999999 kB\nMemAvailable: {100 * 1024} kB\n")
    (tmp_path / "own").write_text("")
    monkeypatch.setattr(machine, "_MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_CONTROL_GROUP", tmp_path / "groups")
    return tmp_path


def group(path: Path, **files: object) -> None:
    path.mkdir(parents=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_group_all_that_the_machine_has_free_can_be_had(groups: Path) -> None:
    assert this_machine().free_bytes == 100 * MIB


def test_the_limit_of_the_own_group_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/system/run\n")
    used = {"memory__max": 60 * MIB, "memory__current": 40 * MIB}
    group(
        groups / "groups/system/run",
        **used,
        memory__stat=f"active_file {MIB}\ninactive_file {9 * MIB}",
    )
    assert this_machine().free_bytes == 30 * MIB


def test_a_container_sees_its_group_as_the_root(groups: Path) -> None:
    (groups / "own").write_text("0::/docker/0815\n")
    group(groups / "groups", memory__max=60 * MIB, memory__current=40 * MIB)
    assert this_machine().free_bytes == 20 * MIB


def test_the_older_kind_of_group_counts_with_the_groups_below_it(groups: Path) -> None:
    (groups / "own").write_text("5:cpu:/\n4:memory:/run\n0::/\n")
    used = {"memory__limit_in_bytes": 60 * MIB, "memory__usage_in_bytes": 40 * MIB}
    pages = f"inactive_file {MIB}\ntotal_inactive_file {5 * MIB}"
    group(groups / "groups/memory/run", **used, memory__stat=pages)
    assert this_machine().free_bytes == 25 * MIB


def test_no_limit_is_none(groups: Path) -> None:
    (groups / "own").write_text("0::/\n")
    group(groups / "groups", memory__max="max", memory__current=40 * MIB)
    assert this_machine().free_bytes == 100 * MIB


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_freed_memory_is_given_back_though_something_behind_it_lives_on() -> None:
    # In a process that has freed much before, what lives on would not lie behind.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        assert fresh.submit(_bytes_given_back).result() > 50 * MIB


def _bytes_given_back() -> int:
    # Not so large that the allocator asks the system for each.
    pairs = [(torch.ones(MIB // 64), torch.ones(64)) for _ in range(2000)]
    kept = [small for _, small in pairs]
    del pairs
    before = anonymous_bytes()
    give_back_freed_memory()
    assert len(kept) == 2000
    return before - anonymous_bytes()
