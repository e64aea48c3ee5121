"""A recipe: everything that decides what a pruning run computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import regex
import torch

from sparseserve.checkpoint.quantization import Quantization
from sparseserve.devices import COMPUTE_DTYPES, DTYPES, autocast_dtype
from sparseserve.errors import RecipeError, first_line, unknown_name
from sparseserve.paths import shown
from sparseserve.pruners import PRUNERS, Pruner
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.quantize import QuantizeKept
from sparseserve.recipe.correction import ErrorCorrection
from sparseserve.recipe.steps import Reconstruction
from sparseserve.recipe.values import check_numbers
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import TWO_FOUR, SparsityPattern
from sparseserve.text.calibration import CalibrationSpec

RECIPE_VERSION = 1
_SEARCH_SECONDS = 1
EXPERTS = ("prune", "dense")
ROTATIONS = ("none", "heads")


def matches(expression: str, module: str) -> bool:
    """Whether an ``expression`` of ``ignore`` is found in the full name of a module.

    All searches go through here: another engine reads other expressions, and has no limit of time.

    Raises:
        RecipeError: It would be searched for ever.
    """
    try:
        return regex.search(expression, module, timeout=_SEARCH_SECONDS) is not None
    except TimeoutError as error:
        raise RecipeError(
            f"ignore {shown(expression)} was searched in {module} for more than "
            f"{_SEARCH_SECONDS} s: write it without repeats inside repeats"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRecipe:
    """What to do to a model; without arguments, the recipe ``default``.

    Attributes:
        pattern: Where zeros must be.
        pruner: Which method, with its knobs.
        error_correction: ``intra`` lets every operator repair the errors of those already pruned
            in its decoder layer, ``intra+inter`` those of earlier layers too; ``none`` shows every
            operator the dense inputs, ``sequential`` those that the pruned layers before produce.
        inter_weight: Share of the errors that ``intra+inter`` repairs, 0 to 1.
        reconstruction: How each layer is trained towards its dense outputs afterwards.
        retraining: How the whole model is trained on the calibration text at the end.
        quantization: To how few bits the kept weights are rounded, last of all.
        calibration: Which text.
        ignore: Regular expressions searched in full module names; matches stay dense.
        experts: Whether the experts of a mixture are pruned like everything else, or stay dense:
            ``prune`` or ``dense``.
        rotate: ``heads`` rotates the values of each attention head before a layer is pruned, so
            that less is lost; the model computes the same. ``none`` leaves them.
        dtype: Of the stored weights; ``auto`` keeps the model's own.
        compute_dtype: What products inside layers are computed in while text runs through them and
            while they are trained: ``float32``, ``bfloat16``, or ``auto``, which is bfloat16 on
            processors that have instructions for it. Statistics, solvers and the values that
            training changes are float32 in any case.
    """

    pattern: SparsityPattern = TWO_FOUR
    # Repairing the errors of other layers too fits the calibration text closely: pull harder.
    # Next to that pull a penalty below 0.3 does next to nothing, for two fifths of the updates.
    pruner: Pruner = field(default_factory=lambda: Admm(first_penalty=0.3, damping=0.1))
    error_correction: str = "intra+inter"
    inter_weight: float = 0.5
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    retraining: Retraining = field(default_factory=Retraining)
    quantization: Quantization = field(default_factory=Quantization)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    ignore: tuple[str, ...] = ()
    experts: str = "prune"
    rotate: str = "none"
    dtype: str = "auto"
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_numbers(self)
        ErrorCorrection.named(self.error_correction, self.inter_weight)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise RecipeError(unknown_name("dtype", self.dtype, ("auto", *DTYPES)))
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise RecipeError(unknown_name("compute_dtype", self.compute_dtype, COMPUTE_DTYPES))
        if self.experts not in EXPERTS:
            raise RecipeError(unknown_name("experts", self.experts, EXPERTS))
        if self.rotate not in ROTATIONS:
            raise RecipeError(unknown_name("rotate", self.rotate, ROTATIONS))
        trained = self.reconstruction.epochs or self.retraining.epochs
        if trained and self.calibration.samples < 2:
            raise RecipeError(
                "training holds calibration windows out, so it needs at least --samples 2; or "
                "leave it out: --reconstruct 0 --retrain 0"
            )
        for expression in self.ignore:
            try:
                regex.compile(expression)
            except (regex.error, RecursionError, OverflowError) as error:
                raise RecipeError(
                    f"ignore {shown(expression)} is not a regular expression: {first_line(error)}"
                ) from error

    @property
    def method(self) -> str:
        """The pruner's name in the table."""
        return next(name for name, kind in PRUNERS.items() if type(self.pruner) is kind)

    @property
    def correction(self) -> ErrorCorrection:
        """What the error correction needs."""
        return ErrorCorrection.named(self.error_correction, self.inter_weight)

    @property
    def compares_with_dense(self) -> bool:
        """Whether the hidden states of the dense model are needed beside those of the pruned."""
        return self.correction.needs_dense or self.reconstruction.epochs > 0

    @property
    def smooths_inputs(self) -> bool:
        """Whether channels are scaled first: where a server rounds what enters an operator."""
        return isinstance(self.pruner, QuantizeKept) and self.pruner.quantization.to == "int8"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype to store weights in; None keeps the model's own."""
        return DTYPES.get(self.dtype)

    def autocast_to(self, device: torch.device) -> torch.dtype | None:
        """What products inside layers are rounded to on ``device``; None leaves them alone."""
        return autocast_dtype(self.compute_dtype, device)

    def ignores(self, module: str) -> bool:
        """Whether a linear of that full name stays dense.

        Raises:
            RecipeError: An expression would be searched for ever.
        """
        return any(matches(expression, module) for expression in self.ignore)

    def to_json(self) -> dict[str, object]:
        """Return JSON data that ``recipe_from_mapping`` reads back to an equal recipe."""
        return {
            "version": RECIPE_VERSION,
            "pattern": str(self.pattern),
            "error_correction": self.error_correction,
            "inter_weight": self.inter_weight,
            "ignore": list(self.ignore),
            "experts": self.experts,
            "rotate": self.rotate,
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
            "method": {"name": self.method, **asdict(self.pruner)},  # type: ignore[call-overload]  # every entry of PRUNERS is a dataclass
            "reconstruction": asdict(self.reconstruction),
            "retraining": asdict(self.retraining),
            "quantization": asdict(self.quantization),
            "calibration": asdict(self.calibration),
        }
