"""Kinds of input from outside: of each a corpus, and an attempt at one damaged piece of it.

An attempt ends in one of three ways. It returns: the input was accepted, and what was read is what
its bytes say, by a plain reading of their own. It raises a ``SparseServeError``: the input was
refused. Anything else is a fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stress.fuzz_checkpoints import (
    prepare_artifacts,
    prepare_codes,
    prepare_headers,
    prepare_packed,
    try_codes,
    try_header,
    try_manifest,
    try_packed,
    try_quantisation,
)
from benchmarks.stress.fuzz_models import prepare_models, prepare_shards, try_config, try_index
from benchmarks.stress.fuzz_texts import prepare_recipes, prepare_texts, try_recipe, try_text
from benchmarks.stress.mutations import Chance


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of input.

    Attributes:
        name: As the table calls it.
        prepare: Writes the corpus to a folder.
        attempt: Damages a piece of the corpus in that folder, by chance, and reads it.
        share: How many of a hundred inputs are of this kind.
    """

    name: str
    prepare: Callable[[Path], None]
    attempt: Callable[[Path, Chance], None]
    share: int


KINDS = (
    Kind("safetensors headers", prepare_headers, try_header, 36),
    Kind("manifests", prepare_artifacts, try_manifest, 6),
    Kind("packed weights", prepare_packed, try_packed, 3),
    Kind("packed codes", prepare_codes, try_codes, 3),
    Kind("config.json", prepare_models, try_config, 5),
    Kind("quantization_config", prepare_packed, try_quantisation, 3),
    Kind("indices", prepare_shards, try_index, 3),
    Kind("recipes", prepare_recipes, try_recipe, 21),
    Kind("texts", prepare_texts, try_text, 20),
)
