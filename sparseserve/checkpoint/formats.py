"""The formats a pruned checkpoint can have, one line each.

Nothing heavy is imported here: the command line reads its choices from this table, and vLLM's
processes the name of the method.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparseserve.errors import ArtifactError, RecipeError, unknown_name

# How vLLM and config.json call checkpoints of ours, and the entry point of the plugin.
METHOD = "sparseserve"


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        storage: The module that knows how a pruned weight is stored, read and verified; it is a
            ``checkpoint.storage.WeightStorage``.
        exporter: ``MODULE:FUNCTION`` that writes a checkpoint in it; an ``exporters.Exporter``.
        pattern: The only pattern that it can hold; None for any.
    """

    storage: str
    exporter: str
    pattern: str | None = None


FORMATS: dict[str, Format] = {
    "packed24": Format(
        "sparseserve.checkpoint.packed24", "sparseserve.exporters.packed24:export_packed24", "2:4"
    ),
    "semi_structured": Format(
        "sparseserve.checkpoint.semi_structured",
        "sparseserve.exporters.semi_structured:export_semi_structured",
        "2:4",
    ),
    "dense": Format("sparseserve.checkpoint.dense", "sparseserve.exporters.dense:export_dense"),
}


def default_format(pattern: str) -> str:
    """Return the first format of the table that can hold ``pattern``."""
    return next(name for name, row in FORMATS.items() if row.pattern in (pattern, None))


def require_fit(name: str, pattern: str) -> None:
    """Refuse a format that there is not, or that cannot hold weights of ``pattern``.

    Raises:
        RecipeError: No format has that name.
        ArtifactError: Names the pattern and the remedy.
    """
    if name not in FORMATS:
        raise RecipeError(unknown_name("format", name, FORMATS))
    if FORMATS[name].pattern not in (pattern, None):
        raise ArtifactError(
            f"{name} holds only {FORMATS[name].pattern} weights, not {pattern}: "
            f"use --format {default_format(pattern)}"
        )
