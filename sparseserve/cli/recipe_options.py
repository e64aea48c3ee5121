"""The options that say which recipe to prune with, and the recipe that they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sparseserve.cli.options import Command, collected, text_column_option

if TYPE_CHECKING:
    from sparseserve.recipe.settings import PruneRecipe

_TEXT = (
    click.option("--pattern", help="2:4, any N:M, or a share of zeros such as 50%."),
    click.option(
        "--calibration", help="Text file, folder or dataset name; default: packaged text."
    ),
    text_column_option,
    click.option("--samples", type=int, help="Calibration windows."),
    click.option("--sequence-length", type=int, help="Tokens per calibration window."),
    click.option("--seed", type=int, help="Draws the calibration windows."),
    click.option("--dtype", help="auto, float32, bfloat16 or float16, of the stored weights."),
    click.option(
        "--ignore", multiple=True, help="Regular expression; matching linears stay dense."
    ),
)
_RECIPE = click.option(
    "--recipe",
    help="default, which is the default, untrained, fast, paper or FILE.toml.",
)
_SOLVER = (
    click.option(
        "--method",
        help="fista, admm, sparsegpt, wanda and others. Alone: that method as published, without "
        "training. With --recipe: that recipe with this method as its solver.",
    ),
    _RECIPE,
    click.option("--error-correction", help="none, intra, intra+inter or sequential."),
    click.option(
        "--inter-weight",
        type=float,
        help="How much of the earlier layers' errors intra+inter repairs, 0 to 1.",
    ),
    click.option("--reconstruct", type=int, help="Epochs of training each layer; 0 for none."),
    click.option("--retrain", type=int, help="Epochs of training the whole model; 0 for none."),
    click.option(
        "--scrambled", type=int, help="Copies of each window with random tokens; 0 for none."
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
    calibration: str | None = None
    text_column: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    scrambled: int | None = None
    dtype: str | None = None
    ignore: tuple[str, ...] = ()

    def chosen(self) -> PruneRecipe:
        """Return the recipe that was named, changed by the other options.

        Raises:
            RecipeError: There is no such recipe or method, or a value cannot be used.
        """
        from dataclasses import replace

        from sparseserve.recipe.toml import named_recipe
        from sparseserve.sparsity import SparsityPattern

        recipe = named_recipe(self.recipe, self.method)
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
            retraining=replace(recipe.retraining, **_given(epochs=self.retrain)),
            calibration=replace(recipe.calibration, **calibration),
            **_given(
                pattern=None if self.pattern is None else SparsityPattern.parse(self.pattern),
                error_correction=self.error_correction,
                inter_weight=self.inter_weight,
                dtype=self.dtype,
                ignore=self.ignore or None,
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
