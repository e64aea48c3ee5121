"""The formats a pruned checkpoint can have, one line each.

Nothing heavy is imported here: the command line reads its choices from this table, and vLLM's
processes the name of the method.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sparseserve.errors import ArtifactError, MissingExtraError, RecipeError, unknown_name

if TYPE_CHECKING:
    from sparseserve.checkpoint.quantization import Quantization

# How vLLM and config.json call checkpoints of ours, and the entry point of the plugin.
METHOD = "sparseserve"


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        exporter: ``MODULE:FUNCTION`` that writes it; an ``exporters.Exporter``.
        storage: The module that knows how a pruned weight is stored, read and verified; it is a
            ``checkpoint.storage.WeightStorage``. None for what is no checkpoint, but another
            program's own form, which nothing is read from again.
        verifier: ``MODULE:FUNCTION`` that checks such a form, whose hashes are right already.
        pattern: The only pattern that it can hold; None for any.
        quantizes: Whether it can hold weights in fewer bits; its storage then takes them.
        needs: Packages that must be installed, and ``extra`` is what brings them.
        extra: Of this project.
    """

    exporter: str
    storage: str | None = None
    verifier: str | None = None
    pattern: str | None = None
    quantizes: bool = False
    needs: tuple[str, ...] = ()
    extra: str = ""


FORMATS: dict[str, Format] = {
    "packed24": Format(
        "sparseserve.exporters.packed24:export_packed24",
        storage="sparseserve.checkpoint.packed24_storage",
        pattern="2:4",
        quantizes=True,
    ),
    "semi_structured": Format(
        "sparseserve.exporters.semi_structured:export_semi_structured",
        storage="sparseserve.checkpoint.semi_structured",
        pattern="2:4",
    ),
    "dense": Format(
        "sparseserve.exporters.dense:export_dense", storage="sparseserve.checkpoint.dense"
    ),
    "onnx": Format(
        "sparseserve.exporters.onnx:export_onnx",
        verifier="sparseserve.exporters.onnx:verify_onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
    "tensorrt": Format(
        "sparseserve.exporters.tensorrt:export_tensorrt",
        verifier="sparseserve.exporters.tensorrt:verify_tensorrt",
        needs=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
}


def default_format(pattern: str) -> str:
    """Return the first format of the table that can hold ``pattern``."""
    return next(name for name, row in FORMATS.items() if row.pattern in (pattern, None))


def require_fit(name: str, pattern: str, quantization: Quantization | None = None) -> None:
    """Refuse a format that there is not, that cannot hold ``pattern``, or that lacks a package.

    Raises:
        RecipeError: No format has that name, or it holds no quantised weights.
        ArtifactError: Names the pattern and the remedy.
        MissingExtraError: Names the package and the command that brings it.
    """
    if name not in FORMATS:
        raise RecipeError(unknown_name("format", name, FORMATS))
    if FORMATS[name].pattern not in (pattern, None):
        raise ArtifactError(
            f"{name} holds only {FORMATS[name].pattern} weights, not {pattern}: "
            f"use --format {default_format(pattern)}"
        )
    if quantization and not FORMATS[name].quantizes:
        able = " or ".join(name for name, row in FORMATS.items() if row.quantizes)
        raise RecipeError(
            f"{name} holds no {quantization.to} weights: use --format {able} with 2:4, or "
            "--quantize none"
        )
    for package in FORMATS[name].needs:
        if find_spec(package) is None:
            raise MissingExtraError(package, FORMATS[name].extra, f"--format {name}")
