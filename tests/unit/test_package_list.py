"""The packages that pyproject.toml lists are those that the tree has."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The links sparseserve/exporters and sparseserve/serving give these folders their import names.
PLACES = {
    "sparseserve": "sparseserve",
    "exporters": "sparseserve.exporters",
    "serving": "sparseserve.serving",
}


def test_every_package_of_the_tree_is_listed_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    found = [
        ".".join([name, *file.parent.relative_to(ROOT / place).parts])
        for place, name in PLACES.items()
        for file in (ROOT / place).rglob("__init__.py")
        if not any(
            (ROOT / place / part).is_symlink() for part in file.relative_to(ROOT / place).parts[:1]
        )
    ]
    assert sorted(found) == sorted(listed)
