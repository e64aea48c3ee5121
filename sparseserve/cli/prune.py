"""``sparseserve prune-and-export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparseserve.cli.budget import DialOptions, dial_options, run_dial
from sparseserve.cli.options import json_option, required_output, text_column_option

if TYPE_CHECKING:
    from sparseserve.checkpoint.artifact import Format
    from sparseserve.recipe.settings import PruneRecipe


@click.command("prune-and-export")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder to write.")
@click.option(
    "--method",
    help="fista, admm, sparsegpt, wanda and others, each without the recipe's training and "
    "scrambled windows; default: the recipe's.",
)
@click.option(
    "--recipe", default="default", show_default=True, help="default, fast, paper or FILE.toml."
)
@click.option("--pattern", help="2:4, any N:M, or a share of zeros such as 50%.")
@click.option("--error-correction", help="none, intra, intra+inter or sequential.")
@click.option("--inter-weight", type=float, help="Of intra+inter: errors repaired, 0 to 1.")
@click.option("--reconstruct", type=int, help="Epochs of training each layer; 0: none.")
@click.option("--retrain", type=int, help="Epochs of training the whole model; 0 for none.")
@click.option("--calibration", help="Text file, folder or dataset name; default: packaged text.")
@text_column_option
@click.option("--samples", type=int, help="Calibration windows.")
@click.option("--sequence-length", type=int, help="Tokens per calibration window.")
@click.option("--seed", type=int, help="Draws the calibration windows.")
@click.option("--scrambled", type=int, help="Copies of each window with random tokens; 0: none.")
@click.option(
    "--format",
    "export_format",
    type=click.Choice(["packed24", "dense"]),
    help="How to store the result; default: packed24 for 2:4, else dense.",
)
@click.option("--dtype", help="auto, float32, bfloat16 or float16, of the stored weights.")
@click.option("--ignore", multiple=True, help="Regular expression; matching linears stay dense.")
@click.option("--device", help="Where to prune: cpu or cuda; default: cuda if there is one.")
@dial_options
@click.option("--dry-run", is_flag=True, help="Only list what would be pruned.")
@json_option
def prune_command(
    *,
    model: str,
    output: Path | None,
    method: str | None,
    recipe: str,
    pattern: str | None,
    error_correction: str | None,
    inter_weight: float | None,
    reconstruct: int | None,
    retrain: int | None,
    calibration: str | None,
    text_column: str | None,
    samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    scrambled: int | None,
    export_format: str | None,
    dtype: str | None,
    ignore: tuple[str, ...],
    device: str | None,
    dial: DialOptions,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Prune MODEL, a folder or a hub name, and write the checkpoint.

    A run that is interrupted goes on when the same command is given again.
    """
    from sparseserve.cli.console import quiet_libraries

    quiet_libraries()
    dial.check(dry_run=dry_run)
    settings = _recipe(
        recipe,
        method=method,
        values={
            "pattern": pattern,
            "error_correction": error_correction,
            "inter_weight": inter_weight,
            "dtype": dtype,
            "ignore": list(ignore) or None,
        },
        calibration={
            "source": calibration,
            "text_column": text_column,
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": seed,
            "scrambled": scrambled,
        },
        reconstruct=reconstruct,
        retrain=retrain,
    )
    if dry_run:
        _print_plan(model, settings, as_json)
    elif dial.given:
        run_dial(
            model,
            output,
            dial,
            recipe=settings,
            export_format=_format(settings, export_format),
            device=device,
            as_json=as_json,
        )
    else:
        _prune(
            model,
            required_output(output),
            recipe=settings,
            export_format=_format(settings, export_format),
            device=device,
            as_json=as_json,
        )


def _format(recipe: PruneRecipe, asked: str | None) -> Format:
    """Return what was ``asked`` for, or the format that fits the pattern."""
    from sparseserve.sparsity import TWO_FOUR

    default = "packed24" if recipe.pattern == TWO_FOUR else "dense"
    return "dense" if (asked or default) == "dense" else "packed24"


def _recipe(
    name: str,
    *,
    method: str | None,
    values: dict[str, object],
    calibration: dict[str, object],
    reconstruct: int | None,
    retrain: int | None,
) -> PruneRecipe:
    """Overlay the options that were given on the recipe."""
    from dataclasses import replace

    from sparseserve.errors import RecipeError
    from sparseserve.recipe.settings import load_recipe, recipe_from_mapping

    recipe = load_recipe(name)
    other_method = method is not None and method != recipe.method.removesuffix("-paper")
    if other_method:
        reconstruct, retrain = reconstruct or 0, retrain or 0
    if reconstruct is not None:
        knobs = replace(recipe.reconstruction, epochs=reconstruct)
        recipe = replace(recipe, reconstruction=knobs)
    if retrain is not None:
        recipe = replace(recipe, retraining=replace(recipe.retraining, epochs=retrain))
    base = recipe.to_json()
    own = base["method"]
    spec = base["calibration"]
    if not isinstance(own, dict) or not isinstance(spec, dict):
        raise AssertionError("a recipe's method and calibration are tables")
    if other_method:
        if name == "paper":
            raise RecipeError(
                f"recipe 'paper' is FISTAPruner: --method {method} has no such recipe"
            )
        own = {"name": method}
        spec["scrambled"] = 0
    given = {key: value for key, value in values.items() if value is not None}
    spec |= {key: value for key, value in calibration.items() if value is not None}
    return recipe_from_mapping({**base, **given, "method": own, "calibration": spec})


def _prune(
    model: str,
    output: Path,
    *,
    recipe: PruneRecipe,
    export_format: Format,
    device: str | None,
    as_json: bool,
) -> None:
    from sparseserve.cli.console import pruning_progress, show_artifact
    from sparseserve.devices import torch_device
    from sparseserve.workflow import prune_and_export

    with pruning_progress() as progress:
        artifact = prune_and_export(
            model,
            output,
            recipe,
            export_format=export_format,
            device=torch_device(device),
            progress=progress,
            on_stage=progress.stage,
        )
    show_artifact(artifact, as_json=as_json)


def _print_plan(model: str, recipe: PruneRecipe, as_json: bool) -> None:
    from dataclasses import asdict

    from sparseserve.workflow import plan

    found = plan(model, recipe)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for name, (rows, columns) in found.operators:
        click.echo(f"prune  {name}  {rows} x {columns}")
    for name in found.dense_modules:
        click.echo(f"dense  {name}  (matches --ignore)")
    share = found.pruned_parameters / found.total_parameters
    click.echo(
        f"{len(found.operators)} operators with {found.pruned_parameters:,} of "
        f"{found.total_parameters:,} parameters ({share:.1%}) to {recipe.pattern}"
    )
