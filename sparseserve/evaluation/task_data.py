"""Which tasks lm-eval is to run: its own definitions, with their data from the hub or from here.

A definition is a YAML file of lm-eval's package: which data set, how a row becomes a question, what
counts. Local data replace the data set and nothing else, so that scores are those of lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseserve.errors import MissingExtraError, RecipeError, first_line
from sparseserve.paths import shown
from sparseserve.text import TextFile

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

#: What the library ``datasets`` calls the reader of each kind of file.
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPLITS = ("training", "validation", "test", "fewshot")
_NAME = re.compile(rb"^task:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """What lm-eval is asked for.

    Attributes:
        manager: Knows the tasks.
        specs: By which it knows them.
        files: Local data, if any.
        kinds: Of each task, by lm-eval's words, such as ``multiple_choice``.
    """

    manager: TaskManager
    specs: tuple[str, ...]
    files: tuple[TextFile, ...]
    kinds: Mapping[str, str]


def choose_tasks(names: Sequence[str], folder: Path | None, scratch: Path) -> TaskChoice:
    """Find lm-eval's definitions of ``names``.

    Args:
        names: Tasks, groups or tags of lm-eval.
        folder: Local data sets: ``NAME.jsonl`` (or ``.json``, ``.parquet``) holds the rows that the
            task is scored on, ``NAME/SPLIT.jsonl`` those of any split. None is the hub.
        scratch: An empty folder, which must stay while the tasks are used.

    Raises:
        MissingExtraError: lm-eval is not installed.
        RecipeError: A name is unknown, or the folder has no data for it.
    """
    if not names:
        raise RecipeError("--tasks names no task: give some, such as piqa,openbookqa")
    definitions = _find(names, _package_folder() / "tasks")
    if folder is not None:
        return _local(names, definitions, folder, scratch)
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # optional

    if all(name in definitions for name in names):  # a whole index takes half a minute
        manager = TaskManager(include_defaults=False)
        specs = tuple(str(definitions[name]) for name in names)
    else:
        manager = TaskManager()
        for name in names:
            if name not in manager.all_tasks:
                raise RecipeError(_unknown(name, manager.all_tasks))
        specs = tuple(names)
    return TaskChoice(manager, specs, (), _download(manager, specs, names))


def _download(manager: TaskManager, specs: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Have the library ``datasets`` fetch what is not in its cache yet; return the kinds."""
    try:
        tasks = manager.load(list(specs))["tasks"]
        return {name: str(task.OUTPUT_TYPE) for name, task in tasks.items()}
    except Exception as error:  # data sets and their transports share no base class
        raise RecipeError(
            f"--tasks {','.join(names)}: the data cannot be loaded ({first_line(error)}): where "
            "the hub cannot be reached, give them with --tasks-from"
        ) from error


def _package_folder() -> Path:
    package = find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        raise MissingExtraError("lm-eval", "eval", "--tasks")
    return Path(package.submodule_search_locations[0])


def _find(names: Sequence[str], definitions: Path) -> dict[str, Path]:
    """Return the file among lm-eval's ``definitions`` of each name that is a single task."""
    found: dict[str, Path] = {}
    for path in sorted(definitions.rglob("*.yaml"), key=Path.as_posix):
        for name in _NAME.findall(path.read_bytes()):
            if name.decode() in names:
                found.setdefault(name.decode(), path)  # lm-eval, too, takes the first
    return found


def _local(
    names: Sequence[str], definitions: dict[str, Path], folder: Path, scratch: Path
) -> TaskChoice:
    from lm_eval.tasks import TaskManager  # noqa: PLC0415  # optional

    if not folder.is_dir():
        raise RecipeError(f"--tasks-from {shown(str(folder))} is no folder: give one of data sets")
    plain, overridden = scratch / "plain", scratch / "overridden"
    for each in (plain, overridden):
        each.mkdir()
    for name in names:
        if name not in definitions:
            raise RecipeError(
                f"--tasks-from: {shown(name)} is no single task of lm-eval: groups and tags get "
                "their data from the hub only, so name their tasks one by one"
            )
        _write(plain / f"{name}.yaml", {"include": str(definitions[name]), "task": name})
    index = TaskManager(include_path=str(plain), include_defaults=False).task_index
    files: list[TextFile] = []
    for name in names:
        settings = dict(index[name].cfg or {})
        data = _data_files(name, settings, folder)
        files += [
            TextFile(path.relative_to(folder).as_posix(), _sha256(path)) for path in data.values()
        ]
        override = _override(settings, data, scratch / "cache")
        _write(
            overridden / f"{name}.yaml",
            {"include": str(definitions[name]), "task": name, **override},
        )
    manager = TaskManager(include_path=str(overridden), include_defaults=False)
    kinds = {name: _ask_first_question(manager, name, folder) for name in names}
    return TaskChoice(manager, tuple(names), tuple(files), kinds)


def _data_files(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Return the local file of each split of a task."""
    scored = settings.get("test_split") or settings.get("validation_split")
    whole = [folder / f"{name}{suffix}" for suffix in READERS]
    found = {str(scored): path for path in whole if path.is_file()}
    if not found:
        files = sorted((folder / name).glob("*")) if (folder / name).is_dir() else []
        found = {path.stem: path for path in files if path.suffix in READERS}
    if not found:
        raise RecipeError(
            f"--tasks-from {folder} holds no {name}.jsonl, {name}.json or {name}.parquet, and no "
            f"such files of splits in {name}/: put the rows there, with the columns that the data "
            f"set {settings.get('dataset_path')} has"
        )
    if len({READERS[path.suffix] for path in found.values()}) > 1:
        raise RecipeError(f"--tasks-from {folder}: {name} mixes JSON and Parquet: give one kind")
    return found


def _override(settings: dict[str, Any], data: dict[str, Path], cache: Path) -> dict[str, object]:
    """Return the settings of a task that local ``data`` change."""
    splits = {f"{split}_split": settings.get(f"{split}_split") for split in SPLITS}
    suffix = next(iter(data.values())).suffix
    return {
        "dataset_path": READERS[suffix],
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path.resolve()) for split, path in data.items()},
            "cache_dir": str(cache),
        },
        **{key: name if name in data else None for key, name in splits.items()},
    }


def _ask_first_question(manager: TaskManager, name: str, folder: Path) -> str:
    """Refuse rows without the columns that their task reads; return the task's kind."""
    try:
        task = manager.load([name])["tasks"][name]
        row = next(iter(task.eval_docs))
        task.doc_to_text(row)
        target = task.doc_to_target(row)
        if task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, int):
            task.doc_to_choice(row)[target]
        elif task.OUTPUT_TYPE == "multiple_choice" and isinstance(target, str):
            task.doc_to_choice(row).index(target)
        return str(task.OUTPUT_TYPE)
    except Exception as error:  # definitions are templates and programs of lm-eval's
        raise RecipeError(
            f"--tasks-from {folder}: the rows of {name} do not fit lm-eval's task "
            f"({first_line(error)}): they need the columns and values of its data set"
        ) from error


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"--tasks: lm-eval has no task {shown(name)}: {hint}'lm-eval ls tasks' lists them"


def _write(path: Path, settings: dict[str, object]) -> None:
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
