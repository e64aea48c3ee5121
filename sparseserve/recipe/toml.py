r"""Recipes by name: presets, TOML files, and pruning methods as they were published.

The presets are

- ``default``: the best setting found that does not retrain the whole model; also ``PruneRecipe()``;
- ``best``: ``default`` with rotated heads, and the whole model distilled on as many further windows
  of text; takes the memory that training the whole model takes;
- ``parallel``: ``default`` with correction ``intra``: layers are pruned and trained on dense
  inputs. They do not depend on one another, and may be pruned on many machines at once;
- ``untrained``: ``default`` without training and without scrambled windows;
- ``fast``: SparseGPT as its authors run it;
- ``paper``: FISTAPruner as published.

A TOML file states the same keys. A key that it leaves out has the value of ``default``, one of
``[method]`` the method's own::

    version = 1
    pattern = "2:4"               # or N:M, or "50%"
    error_correction = "intra+inter"  # or "none", "intra", "sequential"
    inter_weight = 0.5            # how much of the layers' errors "intra+inter" repairs, 0 to 1
    ignore = ["layers\\.0\\."]     # regular expressions; matching linears stay dense
    rotate = "none"               # or "heads": the values of attention, before pruning
    dtype = "auto"                # or float32, bfloat16, float16: of the stored weights
    compute_dtype = "auto"        # or float32, bfloat16: of products inside layers

    [method]
    name = "admm"                 # any pruner, with its own knobs below
    first_penalty = 0.3
    damping = 0.1

    [reconstruction]
    epochs = 3                    # passes over the windows for each decoder layer; 0 for none

    [retraining]
    epochs = 0                    # passes over the windows for the whole model; 0 for none
    every_weight = false          # train all kept weights, not low-rank updates of them
    distillation = 0.0            # 1: towards the dense model's predictions; 0: towards the text
    fresh = 0                     # windows for this alone, which pruning does not see

    [quantization]
    to = "none"                   # or int8, fp8, int4: bits of the kept weights
    group_size = 64               # int4 alone: inputs that share a scale

    [calibration]
    source = "text.txt"           # file, folder or dataset name; left out: the packaged text
    text_column = "text"          # of a table or dataset; left out: text, or messages for chats
    samples = 256
    sequence_length = 512
    seed = 0
    scrambled = 1                 # copies of each window with random tokens, for the first layers
    scrambled_layers = 4
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TypeVar, get_type_hints

from sparseserve.checkpoint.quantization import Quantization
from sparseserve.errors import RecipeError, first_line, unknown_name
from sparseserve.paths import local_path, shown_value
from sparseserve.pruners import PRUNERS, Pruner
from sparseserve.pruners.fista_paper import ENDING_PAPER_FISTA
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.recipe.settings import RECIPE_VERSION, PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.recipe.values import check_type
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import SparsityPattern
from sparseserve.text.calibration import CalibrationSpec

_T = TypeVar("_T")
_LARGEST_FILE = 2**20

UNTRAINED = PruneRecipe(
    reconstruction=Reconstruction(epochs=0), calibration=CalibrationSpec(scrambled=0)
)
PRESETS = {
    "default": PruneRecipe(),
    "best": PruneRecipe(
        rotate="heads", retraining=Retraining().distilling(PruneRecipe().calibration.samples)
    ),
    "parallel": PruneRecipe(error_correction="intra"),
    "untrained": UNTRAINED,
    "fast": replace(UNTRAINED, pruner=SparseGPT(), error_correction="sequential"),
    "paper": replace(
        UNTRAINED,
        pruner=ENDING_PAPER_FISTA,
        error_correction="intra",
        calibration=replace(UNTRAINED.calibration, samples=128, sequence_length=2048),
    ),
}
#: What each method repairs when it is run as published. The programs of most papers prune a layer
#: on what the pruned layers before it produce. FISTAPruner keeps layers independent and repairs
#: errors inside a layer; ``fista`` is our version of it.
PUBLISHED_CORRECTIONS = {
    "magnitude": "sequential",
    "wanda": "sequential",
    "ria": "sequential",
    "dsnot": "sequential",
    "sparsegpt": "sequential",
    "admm-gradual": "sequential",
    "admm": "sequential",
    "refit": "sequential",
    "fista": "intra",
    "fista-paper": "intra",
}


def load_recipe(name: str) -> PruneRecipe:
    """Return a preset, or read a TOML file.

    Raises:
        RecipeError: No such preset or file, or a key or value of the file is wrong.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = local_path(name, "recipe", RecipeError)
    if not path.is_file():
        raise RecipeError(f"{unknown_name('recipe', name, PRESETS)}; nor is it a file")
    try:
        if (size := path.stat().st_size) > _LARGEST_FILE:
            raise RecipeError(
                f"{path}: {size:,} bytes are more than the {_LARGEST_FILE:,} of a recipe"
            )
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise RecipeError(f"{path}: cannot be read as TOML: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as TOML: {first_line(error)}") from error
    try:
        return recipe_from_mapping(data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def named_recipe(recipe: str | None, method: str | None) -> PruneRecipe:
    """Return what a recipe's name and a method's name ask for together.

    Args:
        recipe: A preset or a TOML file; None where only a method, or nothing, is named.
        method: A pruner. Alone it is that method untrained, with the error correction of its
            paper. Beside a recipe it is that recipe with another solver.

    Raises:
        RecipeError: There is no such recipe or method.
    """
    if method is None:
        return load_recipe(recipe or "default")
    pruner = pruner_from_mapping({"name": method})
    if recipe is None:
        return replace(UNTRAINED, pruner=pruner, error_correction=PUBLISHED_CORRECTIONS[method])
    loaded = load_recipe(recipe)
    # A recipe that has this solver already keeps the settings it gives it.
    return loaded if loaded.method == method else replace(loaded, pruner=pruner)


def recipe_from_mapping(data: Mapping[str, object]) -> PruneRecipe:
    """Build a recipe from the tables of a TOML file or from ``PruneRecipe.to_json``.

    Raises:
        RecipeError: A key is unknown or a value is of the wrong type or out of range.
    """
    rest = dict(data)
    version = rest.pop("version", RECIPE_VERSION)
    if isinstance(version, bool) or version != RECIPE_VERSION:
        raise RecipeError(f"version {shown_value(version)} is not {RECIPE_VERSION}")
    method = _table(rest, "method")
    calibration = _table(rest, "calibration")
    reconstruction = _table(rest, "reconstruction")
    retraining = _table(rest, "retraining")
    quantization = _table(rest, "quantization")
    if "pattern" in rest:
        rest["pattern"] = SparsityPattern.parse(str(rest["pattern"]))
    return _build(
        PruneRecipe,
        {
            **rest,
            "pruner": pruner_from_mapping(method) if method else PruneRecipe().pruner,
            "reconstruction": _build(Reconstruction, reconstruction),
            "retraining": _build(Retraining, retraining),
            "quantization": _build(Quantization, quantization),
            "calibration": _build(CalibrationSpec, calibration),
        },
    )


def pruner_from_mapping(data: Mapping[str, object]) -> Pruner:
    """Build the pruner that ``name`` says, with the other keys as its knobs.

    Raises:
        RecipeError: No such pruner or knob.
    """
    knobs = dict(data)
    name = str(knobs.pop("name", ""))
    if name not in PRUNERS:
        raise RecipeError(unknown_name("method", name, PRUNERS))
    return _build(PRUNERS[name], knobs)


def _table(data: dict[str, object], key: str) -> dict[str, object]:
    table = data.pop(key, {})
    if not isinstance(table, Mapping):
        raise RecipeError(f"'{key}' must be a table")
    return dict(table)


def _build(kind: type[_T], values: Mapping[str, object]) -> _T:
    """Construct a dataclass, refusing unknown keys and values of another type than its own."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    frozen: dict[str, object] = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(unknown_name("key", key, known))
        frozen[key] = tuple(value) if isinstance(value, list) else value
    hints = get_type_hints(kind)
    for key, value in frozen.items():
        check_type(key, value, hints[key])
    try:
        return kind(**frozen)
    except TypeError as error:
        raise RecipeError(f"{kind.__name__}: a value has the wrong type: {error}") from error
