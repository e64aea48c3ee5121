"""What goes with the weights: configuration, tokenizer, chat template, licence.

A file that we do not change is copied byte for byte, and whatever the configuration or the
tokenizer names comes along. Code is copied too where they name it; it is never run. The model's own
card keeps its bytes, too, but gives up its name: what it says of sizes and scores is true no more.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from sparseserve.checkpoint.artifact import CARD_FILE, MANIFEST_FILE
from sparseserve.checkpoint.json_file import read_json
from sparseserve.checkpoint.tensors import write_json, writing
from sparseserve.checkpoint.weight_files import WEIGHT_KINDS
from sparseserve.errors import ArtifactError

#: The card of the model that was pruned.
SOURCE_CARD_FILE = "SOURCE_README.md"
_NOT_COPIED = {"config.json", MANIFEST_FILE, CARD_FILE, SOURCE_CARD_FILE}
_COPIED_KINDS = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_COPIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_COPIED_FOLDERS = ("additional_chat_templates",)
# Whose strings may name other files. Vocabularies are long, and full of words that name nothing.
_NAMES_FILES = ("config.json", "_config.json", "special_tokens_map.json")
_CLASS = re.compile(r"(?P<module>\w+)\.\w+")


def side_files(source: Path) -> list[str]:
    """Return the paths in ``source`` of all files that keep their names, but ``config.json``.

    Raises:
        ArtifactError: The configuration or the tokenizer names a file that is not there.
    """
    found = {path.name for path in source.iterdir() if path.is_file() and _is_wanted(path.name)}
    for folder in _COPIED_FOLDERS:
        inside = (source / folder).rglob("*") if (source / folder).is_dir() else ()
        found |= {str(path.relative_to(source)) for path in inside if path.is_file()}
    for path in sorted(source.glob("*.json")):
        if path.name.endswith(_NAMES_FILES) and path.is_file():
            found |= set(_named_files(source, path))
    return sorted(found - _NOT_COPIED)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings, licence, card and what they name.

    Raises:
        ArtifactError: The disk is full, or a file that is named is not there.
    """
    copies = {name: source / name for name in side_files(source)}
    if card := source_card(source):
        copies[SOURCE_CARD_FILE] = card
    for name, original in copies.items():
        with writing(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, folder / name)


def source_card(source: Path) -> Path | None:
    """Return the card that the model ``source`` was published with; None if it had none.

    A checkpoint of ours has that of the model it was made from, and one that we wrote.
    """
    ours = (source / MANIFEST_FILE).exists()
    card = source / (SOURCE_CARD_FILE if ours else CARD_FILE)
    return card if card.is_file() else None


def model_config(source: Path, dtype: torch.dtype | None = None) -> dict[str, object]:
    """Read ``config.json``, and say in it that the weights are in ``dtype``; None changes nothing.

    Raises:
        ArtifactError: It is missing or not JSON.
    """
    config = read_json(source / "config.json")
    return config if dtype is None else with_dtype(config, dtype)


def with_dtype(config: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Return ``config`` saying that the weights are in ``dtype``.

    Configurations of parts of a model, such as ``text_config``, follow where they name a dtype.
    """
    changed = copy.deepcopy(config)
    name = str(dtype).removeprefix("torch.")
    for part in (changed, *(value for value in changed.values() if isinstance(value, dict))):
        # Older releases of transformers write and read it under the second name only.
        keys = [key for key in ("dtype", "torch_dtype") if key in part]
        part.update(dict.fromkeys(keys or ["dtype"] * (part is changed), name))
    return changed


def write_config(source: Path, folder: Path, config: dict[str, object]) -> None:
    """Write ``config.json`` to ``folder``, byte for byte as in ``source`` where it says the same.

    Raises:
        ArtifactError: The disk is full.
    """
    if config != read_json(source / "config.json"):
        write_json(folder / "config.json", config)
        return
    with writing(folder / "config.json"):
        shutil.copyfile(source / "config.json", folder / "config.json")


def _is_wanted(name: str) -> bool:
    kind = PurePosixPath(name).suffix
    wanted = kind in _COPIED_KINDS or name.upper().startswith(_COPIED_NAMES)
    return wanted and not name.endswith(".index.json") and kind not in WEIGHT_KINDS


def _named_files(source: Path, where: Path) -> Iterator[str]:
    """Yield the files of ``source`` that the strings in the JSON file ``where`` name."""
    settings = read_json(where)
    for text in _strings(settings):
        if _is_file_of(source, text) and PurePosixPath(text).suffix not in WEIGHT_KINDS:
            yield str(PurePosixPath(text))
    classes = [match["module"] for text in _strings(settings) if (match := _CLASS.fullmatch(text))]
    # A module of the model's own may import any other that lies beside it.
    if any((source / f"{module}.py").is_file() for module in classes):
        yield from (path.name for path in source.glob("*.py") if path.is_file())
    for text in _strings(settings.get("auto_map")):
        match = _CLASS.fullmatch(text)  # others, OWNER/NAME--MODULE.CLASS, lie elsewhere
        if match and not (source / f"{match['module']}.py").is_file():
            raise ArtifactError(
                f"{where}: auto_map names {text}, but there is no {match['module']}.py beside it: "
                "download that file too, or take the entry out of auto_map"
            )


def _is_file_of(source: Path, text: str) -> bool:
    path = PurePosixPath(text)
    if not text or len(text) > 255 or "\0" in text or path.is_absolute() or ".." in path.parts:
        return False
    return (source / text).is_file()


def _strings(data: object) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _strings(item)
