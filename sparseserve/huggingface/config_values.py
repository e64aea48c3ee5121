"""What a config.json and its neighbours may say, before transformers acts on it.

transformers makes lists, tables and modules of the length that a configuration names, so a few
wrong digits would keep it busy for hours. It also opens the files beside the configuration, and a
pipe among them would never end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sparseserve.checkpoint.json_file import LARGEST_JSON, read_json
from sparseserve.errors import UnsupportedModelError
from sparseserve.paths import shown_value

#: More decoder layers than any model has; a configuration makes lists as long as this.
MOST_LAYERS = 10_000
#: Three times the longest context of any model known; programs make tables as long as this.
MOST_POSITIONS = 2**25
#: More labels than any classifier has; transformers makes a name for each.
MOST_LABELS = 100_000

_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(encoder|decoder|hidden)_layers|depth")
_LIMITS = (
    (_LAYERS, MOST_LAYERS),
    (re.compile(r"max_position_embeddings|(original_)?max_positions?|n_positions"), MOST_POSITIONS),
    (re.compile(r"original_max_position_embeddings|max_seq(uence)?_len(gth)?"), MOST_POSITIONS),
    (re.compile(r"num_labels"), MOST_LABELS),
)
# Parts of a configuration that are configurations themselves.
_PARTS = re.compile(r"\w+_config")
# What is read as text or JSON by whatever opens a model, but for the weights.
_READ_WHOLE = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})


def checked_settings(folder: Path) -> dict[str, object]:
    """Read the ``config.json`` of ``folder``.

    Raises:
        UnsupportedModelError: It is no JSON object of readable size, or a value of it is of another
            kind, or far larger, than any model has; names the key, the value and the limit.
    """
    path = folder / "config.json"
    settings = read_json(path, UnsupportedModelError)
    for key, value in _numbers(settings):
        for pattern, most in _LIMITS:
            if pattern.fullmatch(key) and value > most:
                raise UnsupportedModelError(
                    f"{path}: {key} is {shown_value(value)}, more than the {most} that are read: "
                    "restore the original config.json"
                )
    _check_kinds(path, settings)
    return settings


def layer_counts(settings: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of layers that ``settings`` name, by key, those of their parts too."""
    return {key: value for key, value in _numbers(settings) if _LAYERS.fullmatch(key)}


def check_files(folder: Path) -> None:
    """Refuse files beside the weights that would never end, or never fit into memory.

    Raises:
        UnsupportedModelError: Names the file.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix not in _READ_WHOLE or not path.exists() or path.is_dir():
            continue
        if not path.is_file():  # a pipe without a writer would never end
            raise UnsupportedModelError(f"{path}: is not a plain file: copy the model again")
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise UnsupportedModelError(
                f"{path}: has {size:,} bytes, more than the {LARGEST_JSON:,} that are read: copy "
                "or download it again"
            )


def _check_kinds(path: Path, settings: Mapping[str, object]) -> None:
    names = settings.get("architectures")
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if names is not None and not is_list:
        raise _wrong(path, "architectures", names, "a list of names")
    for key, value in settings.items():
        if _PARTS.fullmatch(key) and value is not None and not isinstance(value, dict):
            raise _wrong(path, key, value, "an object")


def _wrong(path: Path, key: str, value: object, wanted: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: {key} is {shown_value(value)}, but must be {wanted}: restore the original "
        "config.json"
    )


def _numbers(settings: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield key, value
