"""The public names, and the layout that gives them their homes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sparseserve


def test_all_is_sorted_and_every_name_can_be_imported() -> None:
    assert sparseserve.__all__ == sorted(sparseserve.__all__)
    assert dir(sparseserve) == sparseserve.__all__
    for name in sparseserve.__all__:
        assert getattr(sparseserve, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = sparseserve.prune


@pytest.mark.parametrize("name", ["exporters", "serving", "tests", "benchmarks"])
def test_the_folders_at_the_top_are_no_packages_of_their_own(tmp_path: Path, name: str) -> None:
    probe = f"import importlib.util as u; raise SystemExit(u.find_spec('{name}') is not None)"
    command = [sys.executable, "-P", "-c", probe]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
