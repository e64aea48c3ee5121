"""The options that say which recipe to prune with, and the recipe that they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sparseserve.cli.options import Command, collected, text_column_option

if TYPE_CHECKING:
    from sparseserve.recipe.settings import PruneRecipe

_TEXT = (
    click.option(
        "--pattern",
        help="What stays: 2:4, any N:M, or a share of zeros such as 50%. The recipe default: 2:4.",
    ),
    click.option(
        "--calibration",
        help="Text that shows what the model reads: a file, folder or dataset name. "
        "Default: the packaged text.",
    ),
    text_column_option,
    click.option(
        "--samples",
        type=int,
        help="Pieces of that text, called windows; more take longer and lose less. The recipe "
        "default: 256.",
    ),
    click.option(
        "--sequence-length", type=int, help="Tokens of each window. The recipe default: 512."
    ),
    click.option("--seed", type=int, help="Which windows are drawn. The recipe default: 0."),
    click.option(
        "--dtype",
        help="Of the stored weights: auto (the model's own), float32, bfloat16 or float16.",
    ),
    click.option(
        "--compute-dtype",
        help="Of products inside layers while text runs through them and while they are trained: "
        "auto (bfloat16 on CPUs made for it), float32 or bfloat16.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        help="Regular expression; operators whose name matches stay dense. May be given again.",
    ),
    click.option(
        "--experts",
        help="What happens to the experts of a mixture: prune (the same as to all else) or dense.",
    ),
)
_RECIPE = click.option(
    "--recipe",
    help="A preset (default, best, parallel, untrained, fast or paper) or FILE.toml. Default: the "
    "preset default.",
)
_SOLVER = (
    click.option(
        "--method",
        help="fista, admm, sparsegpt, wanda and others. Alone: that method without training, "
        "with the error correction of its paper. With --recipe: that recipe with this method as "
        "its solver.",
    ),
    _RECIPE,
    click.option(
        "--error-correction",
        help="Which earlier errors an operator repairs: none, intra (inside its layer), "
        "intra+inter (also earlier layers), sequential (inputs of the pruned model, nothing "
        "repaired). The recipe default: intra+inter.",
    ),
    click.option(
        "--inter-weight",
        type=float,
        help="How much of the earlier layers' errors intra+inter repairs, 0 to 1. The recipe "
        "default: 0.5.",
    ),
    click.option(
        "--reconstruct",
        type=int,
        help="Epochs that each layer is trained after it is pruned; 0 for none. The recipe "
        "default: 3.",
    ),
    click.option(
        "--retrain",
        type=int,
        help="Epochs that the whole model is trained at the end; 0 for none. The recipe default: "
        "0.",
    ),
    click.option(
        "--distill",
        type=int,
        help="Windows of the calibration text that pruning does not see: at the end all kept "
        "weights are trained on them towards the dense model's predictions.",
    ),
    click.option(
        "--rotate",
        help="heads rotates the values of each attention head before pruning, so that less is "
        "lost; none does not.",
    ),
    click.option(
        "--quantize",
        help="Bits of the kept weights, rounded last: int8, fp8, int4 or none. Needs packed24.",
    ),
    click.option(
        "--group-size", type=int, help="int4: inputs that share a scale: 128, 64 or 32; default 64."
    ),
    click.option(
        "--scrambled",
        type=int,
        help="Copies of each window with random tokens, for the first layers; 0 for none. The "
        "recipe default: 1.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """What was given on the command line; None is what was not."""

    recipe: str | None = None
    method: str | None = None
    pattern: str | None = None
    error_correction: str | None = None
    inter_weight: float | None = None
    reconstruct: int | None = None
    retrain: int | None = None
    distill: int | None = None
    calibration: str | None = None
    text_column: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    scrambled: int | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    ignore: tuple[str, ...] = ()
    experts: str | None = None
    rotate: str | None = None
    quantize: str | None = None
    group_size: int | None = None

    def chosen(self) -> PruneRecipe:
        """Return the recipe that was named, changed by the other options.

        Raises:
            RecipeError: There is no such recipe or method, or a value cannot be used.
        """
        from dataclasses import replace

        from sparseserve.checkpoint.quantization import Quantization
        from sparseserve.recipe.toml import named_recipe
        from sparseserve.sparsity import SparsityPattern

        recipe = named_recipe(self.recipe, self.method)
        retraining = recipe.retraining
        if self.distill is not None:
            retraining = retraining.distilling(self.distill)
        quantization = recipe.quantization
        if self.quantize is not None:
            quantization = Quantization(to=self.quantize, group_size=self.group_size)
        elif self.group_size is not None:
            quantization = replace(quantization, group_size=self.group_size)
        calibration = _given(
            source=self.calibration,
            text_column=self.text_column,
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            scrambled=self.scrambled,
        )
        return replace(
            recipe,
            reconstruction=replace(recipe.reconstruction, **_given(epochs=self.reconstruct)),
            retraining=replace(retraining, **_given(epochs=self.retrain)),
            calibration=replace(recipe.calibration, **calibration),
            quantization=quantization,
            **_given(
                pattern=None if self.pattern is None else SparsityPattern.parse(self.pattern),
                error_correction=self.error_correction,
                inter_weight=self.inter_weight,
                dtype=self.dtype,
                compute_dtype=self.compute_dtype,
                ignore=self.ignore or None,
                experts=self.experts,
                rotate=self.rotate,
            ),
        )


def recipe_options(command: Command) -> Command:
    """Add all of them to ``command``, which receives them as one keyword ``recipe``."""
    return collected(command, RecipeOptions, "recipe", (*_SOLVER, *_TEXT))


def text_options(command: Command) -> Command:
    """Add those that matter where no solver runs, as one keyword ``recipe``."""
    return collected(command, RecipeOptions, "recipe", (_RECIPE, *_TEXT))


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None."""
    return {key: value for key, value in values.items() if value is not None}
