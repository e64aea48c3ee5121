r"""A recipe: everything that decides what a pruning run computes.

The presets are ``default``, the best setting found without retraining the whole model, ``fast``,
SparseGPT as its authors run it, and ``paper``, FISTAPruner as published. A TOML file states the
same keys; one that it leaves out is that of ``default``, except that nothing is trained or
scrambled::

    version = 1
    pattern = "2:4"               # or N:M, or "50%"
    error_correction = "intra+inter"  # or "none", "intra", "sequential"
    inter_weight = 0.5            # how much of the layers' errors "intra+inter" repairs, 0 to 1
    ignore = ["layers\\.0\\."]     # regular expressions; matching linears stay dense
    dtype = "auto"                # or float32, bfloat16, float16: of the stored weights

    [method]
    name = "admm"                 # any pruner, with its own knobs below
    damping = 0.1

    [reconstruction]
    epochs = 3                    # passes over the windows for each decoder layer; 0 for none

    [retraining]
    epochs = 3                    # passes over the windows for the whole model; 0 for none

    [calibration]
    source = "text.txt"           # file, folder or dataset name; left out: the packaged text
    samples = 256
    sequence_length = 512
    seed = 0
    scrambled = 1                 # copies of each window with random tokens, for the first layers
    scrambled_layers = 4
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypeVar, get_args

import torch

from sparseserve.devices import DTYPES
from sparseserve.errors import RecipeError, unknown_name
from sparseserve.pruners import PRUNERS, Pruner
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.fista_paper import ENDING_PAPER_FISTA
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.recipe.steps import ErrorCorrection, Reconstruction
from sparseserve.retraining.retrain import Retraining
from sparseserve.sparsity import TWO_FOUR, SparsityPattern
from sparseserve.text.calibration import CalibrationSpec

RECIPE_VERSION = 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecipe:
    """What to do to a model.

    Attributes:
        pattern: Where zeros must be.
        pruner: Which method, with its knobs.
        error_correction: ``intra`` lets every operator repair the errors of those already pruned
            in its decoder layer, ``intra+inter`` those of earlier layers too; ``none`` shows every
            operator the dense inputs, ``sequential`` those that the pruned layers before produce.
        inter_weight: Share of the errors that ``intra+inter`` repairs, 0 to 1.
        reconstruction: How each layer is trained towards its dense outputs afterwards.
        retraining: How the whole model is trained on the calibration text at the end.
        calibration: Which text.
        ignore: Regular expressions searched in full module names; matches stay dense.
        dtype: Of the stored weights; ``auto`` keeps the model's own.
    """

    pattern: SparsityPattern = TWO_FOUR
    # Repairing the errors of other layers too fits the calibration text closely: pull harder.
    pruner: Pruner = field(default_factory=lambda: Admm(damping=0.1))
    error_correction: ErrorCorrection = "intra+inter"
    inter_weight: float = 0.5
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    retraining: Retraining = field(default_factory=Retraining)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    ignore: tuple[str, ...] = ()
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the values that are not checked by their own types."""
        if self.error_correction not in get_args(ErrorCorrection):
            raise RecipeError(
                unknown_name("error_correction", self.error_correction, get_args(ErrorCorrection))
            )
        if not 0 <= self.inter_weight <= 1:
            raise RecipeError(f"inter_weight {self.inter_weight} must be between 0 and 1")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise RecipeError(unknown_name("dtype", self.dtype, ("auto", *DTYPES)))
        trained = self.reconstruction.epochs or self.retraining.epochs
        if trained and self.calibration.samples < 2:
            raise RecipeError(
                "training holds calibration windows out, so it needs at least --samples 2; or "
                "leave it out: --reconstruct 0 --retrain 0"
            )
        for expression in self.ignore:
            try:
                re.compile(expression)
            except re.error as error:
                raise RecipeError(
                    f"ignore '{expression}' is not a regular expression: {error}"
                ) from error

    @property
    def method(self) -> str:
        """The pruner's name in the table."""
        return next(name for name, kind in PRUNERS.items() if type(self.pruner) is kind)

    @property
    def compares_with_dense(self) -> bool:
        """Whether the hidden states of the dense model are needed beside those of the pruned."""
        return self.error_correction != "sequential" or self.reconstruction.epochs > 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to store weights in; None keeps the model's own."""
        return DTYPES.get(self.dtype)

    def ignores(self, module: str) -> bool:
        """Whether a linear of that full name stays dense."""
        return any(re.search(expression, module) for expression in self.ignore)

    def to_json(self) -> dict[str, object]:
        """Return JSON data that ``recipe_from_mapping`` reads back to an equal recipe."""
        return {
            "version": RECIPE_VERSION,
            "pattern": str(self.pattern),
            "error_correction": self.error_correction,
            "inter_weight": self.inter_weight,
            "ignore": list(self.ignore),
            "dtype": self.dtype,
            "method": {"name": self.method, **asdict(self.pruner)},  # type: ignore[call-overload]  # every entry of PRUNERS is a dataclass
            "reconstruction": asdict(self.reconstruction),
            "retraining": asdict(self.retraining),
            "calibration": asdict(self.calibration),
        }


PRESETS = {
    "default": PruneRecipe(
        reconstruction=Reconstruction(epochs=3), calibration=CalibrationSpec(scrambled=1)
    ),
    "fast": PruneRecipe(pruner=SparseGPT(), error_correction="sequential"),
    "paper": PruneRecipe(
        pruner=ENDING_PAPER_FISTA,
        error_correction="intra",
        calibration=CalibrationSpec(samples=128, sequence_length=2048),
    ),
}


def load_recipe(name: str) -> PruneRecipe:
    """Return a preset, or read a TOML file.

    Raises:
        RecipeError: No such preset or file, or a key or value of the file is wrong.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"{unknown_name('recipe', name, PRESETS)}; nor is it a file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return recipe_from_mapping(data)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def recipe_from_mapping(data: Mapping[str, object]) -> PruneRecipe:
    """Build a recipe from the tables of a TOML file or from ``PruneRecipe.to_json``.

    Raises:
        RecipeError: A key is unknown or a value is of the wrong type or out of range.
    """
    rest = dict(data)
    if (version := rest.pop("version", RECIPE_VERSION)) != RECIPE_VERSION:
        raise RecipeError(f"version {version!r} is not {RECIPE_VERSION}")
    method = _table(rest, "method")
    calibration = _table(rest, "calibration")
    reconstruction = _table(rest, "reconstruction")
    retraining = _table(rest, "retraining")
    if "pattern" in rest:
        rest["pattern"] = SparsityPattern.parse(str(rest["pattern"]))
    defaults = PruneRecipe()
    return _build(
        PruneRecipe,
        {
            **rest,
            "pruner": pruner_from_mapping(method) if method else defaults.pruner,
            "reconstruction": _build(Reconstruction, reconstruction),
            "retraining": _build(Retraining, retraining),
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
    """Construct a dataclass, refusing unknown keys and values of another type than the default."""
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # only dataclasses come here
    frozen: dict[str, object] = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(unknown_name("key", key, known))
        frozen[key] = tuple(value) if isinstance(value, list) else value
    default = kind()
    for key, value in frozen.items():
        _check_type(key, value, getattr(default, key))
    try:
        return kind(**frozen)
    except TypeError as error:
        raise RecipeError(f"{kind.__name__}: a value has the wrong type: {error}") from error


def _check_type(key: str, value: object, default: object) -> None:
    if not isinstance(default, bool | int | float | str | tuple):
        return
    expected = (int, float) if isinstance(default, float) else (type(default),)
    if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, expected):
        wanted = "list" if isinstance(default, tuple) else type(default).__name__
        raise RecipeError(f"'{key}' is {value!r}, but must be of type {wanted}")
