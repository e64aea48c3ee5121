"""Which operators a recipe prunes, and whether it can."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from sparseserve.errors import RecipeError
from sparseserve.models.structure import (
    LayerStructure,
    ModelStructure,
    Operator,
    OperatorGroup,
)
from sparseserve.paths import shown
from sparseserve.recipe.settings import PruneRecipe, matches

#: Why the operators of some experts stay dense.
UNSEEN = "no calibration token reached its expert"


def planned_operators(layer: LayerStructure, recipe: PruneRecipe) -> list[Operator]:
    """Return the operators of a layer that the recipe prunes."""
    return [
        operator
        for group in layer.groups
        for operator in group.operators
        if not _stays_dense(layer, group, operator, recipe)
    ]


def check_plan(structure: ModelStructure, recipe: PruneRecipe) -> None:
    """Refuse operators whose width does not fit the pattern, before any work is done.

    Raises:
        RecipeError: Names the operator, its width and the remedy; or says that none is left, or
            which expression of ``ignore`` matches none.
    """
    _require_matches(structure, recipe)
    multiple = recipe.pattern.column_multiple
    total = 0
    for layer in structure.layers:
        for operator in planned_operators(layer, recipe):
            total += 1
            if operator.in_features % multiple:
                raise RecipeError(
                    f"{layer.name}.{operator.name}: in_features {operator.in_features} is not a "
                    f"multiple of {multiple}, which pattern {recipe.pattern} needs: leave it "
                    f"dense with --ignore '{operator.name.split('.')[-1]}$'"
                )
    if not total:
        raise RecipeError(
            "nothing is left to prune: --ignore or --experts dense leaves every linear dense"
        )


def _require_matches(structure: ModelStructure, recipe: PruneRecipe) -> None:
    """Refuse an expression that leaves nothing dense: it is a mistake, or has no meaning."""
    names = [
        layer.full_name(operator) for layer in structure.layers for operator in layer.operators
    ]
    for expression in recipe.ignore:
        if any(matches(expression, name) for name in names):
            continue
        remedy = f"only linears in decoder layers are pruned, such as {names[0]}"
        if expression.startswith("re:"):
            remedy = "leave 're:' out, every value of it is a regular expression"
        elif close := _closest(expression, names):
            remedy = f"did you mean '{close}'?"
        raise RecipeError(f"--ignore {shown(expression)} matches no operator: {remedy}")


def _closest(expression: str, names: Sequence[str]) -> str | None:
    """Return the ending of a name that ``expression`` is much like."""
    parts = [name.split(".") for name in names]
    depth = max(map(len, parts))
    endings = {".".join(part[-length:]) for part in parts for length in range(1, depth)}
    found = difflib.get_close_matches(expression.strip("^$.*\\"), sorted(endings), n=1, cutoff=0.8)
    return found[0] if found else None


def ignored_modules(structure: ModelStructure, recipe: PruneRecipe) -> tuple[str, ...]:
    """Return the full names of the linears in decoder layers that the recipe leaves dense."""
    return tuple(
        layer.full_name(operator)
        for layer in structure.layers
        for group in layer.groups
        for operator in group.operators
        if _stays_dense(layer, group, operator, recipe)
    )


def dense_reasons(structure: ModelStructure) -> dict[str, str]:
    """Return why linears in decoder layers cannot be pruned, by their full names."""
    return {
        f"{layer.name}.{linear.name}": linear.reason
        for layer in structure.layers
        for linear in layer.dense
    }


def _stays_dense(
    layer: LayerStructure, group: OperatorGroup, operator: Operator, recipe: PruneRecipe
) -> bool:
    dense_expert = recipe.experts == "dense" and group.experts is not None
    return dense_expert or recipe.ignores(layer.full_name(operator))
