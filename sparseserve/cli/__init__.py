"""The ``sparseserve`` command."""

from __future__ import annotations

from sparseserve.cli.main import main

__all__ = ["main"]
