"""What do fewer bits cost: of the dense model, and of the kept weights of a 2:4 one?

Every form is made from the same two models with the same calibration windows, and evaluated in
float32 on the same text. ``nearest`` rounds each weight alone; the others repair errors on the
calibration windows (``pruners/quantize.py``), which are those that the model was pruned with.
``inputs`` also rounds what enters the pruned operators to int8, token by token, as a server does::

    sparseserve prune-and-export demo/models/smollm2-135m -o PRUNED --recipe untrained \
        --samples 16 --sequence-length 512 --calibration demo/texts/mixed-calibration.txt \
        --format dense
    python -m benchmarks.quality.quantised PRUNED --result quantised-smollm2.json \
        --text speeches=packaged --text wikipedia=demo/texts/wikipedia-evaluation.txt
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.harness.evaluation_texts import text_option
from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, stored, write_result
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.quantization import Quantization, rounded, scales_of
from sparseserve.cli.console import quiet_libraries
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.layerwise.pipeline import prune_model
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.models.loading import LoadedModel, load_model
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.toml import recipe_from_mapping
from sparseserve.sparsity import TWO_FOUR, SparsityPattern, Violation
from sparseserve.text.calibration import load_calibration
from sparseserve.text.sources import read_text
from sparseserve.text.windows import evaluation_windows
from sparseserve.workflow.quantizing import rounding_recipe

_FULL_BITS = 16


@dataclass(frozen=True, slots=True)
class ThreeBits(Quantization):
    """``int4`` with codes from -3 to 3: no format stores it, but users compare with it."""

    @property
    def largest(self) -> int:
        """The largest code."""
        return 3


@dataclass(frozen=True, slots=True)
class Anywhere(SparsityPattern):
    """The pattern of a dense model: it forbids nothing."""

    density: float = 1.0
    column_multiple: int = 1
    selection_columns: int | None = None
    rows_are_independent: bool = True

    def best_mask(self, scores: Tensor) -> Tensor:
        """Keep everything."""
        return torch.ones_like(scores, dtype=torch.bool)

    def first_violation(self, weight: Tensor) -> Violation | None:
        """Find none."""
        return None


@dataclass(frozen=True, slots=True)
class Form:
    """A way to store the operators that are pruned in the 2:4 model.

    Attributes:
        name: In the table.
        pruned: Whether it starts from the 2:4 model, or from the dense one.
        quantization: ``none`` is 16 bits.
        bits: Of a code.
        corrected: Whether errors are repaired on calibration text.
        inputs: Whether what enters is rounded to int8 as well.
    """

    name: str
    pruned: bool
    quantization: Quantization
    bits: int
    corrected: bool = True
    inputs: bool = False

    def bits_per_weight(self) -> float:
        """Return what a weight of a wide matrix takes: codes, places, and scales of groups."""
        scales = 16 / self.quantization.group_size if self.quantization.group_size else 0
        return (self.bits / 2 + 1 if self.pruned else self.bits) + scales


_INT8, _INT4 = Quantization(to="int8"), Quantization(to="int4")
FORMS = (
    Form("dense", False, Quantization(), _FULL_BITS),
    Form("dense int8", False, _INT8, 8),
    Form("dense int8, inputs too", False, _INT8, 8, inputs=True),
    Form("dense int4", False, _INT4, 4),
    Form("dense int3", False, ThreeBits(to="int4"), 3),
    Form("2:4", True, Quantization(), _FULL_BITS),
    Form("2:4 int8, nearest", True, _INT8, 8, corrected=False),
    Form("2:4 int8", True, _INT8, 8),
    Form("2:4 int8, inputs too", True, _INT8, 8, inputs=True),
    Form("2:4 fp8", True, Quantization(to="fp8"), 8),
    Form("2:4 int4, nearest", True, _INT4, 4, corrected=False),
    Form("2:4 int4", True, _INT4, 4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for all forms."""

    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    evaluation_windows: int
    evaluation_length: int
    texts: dict[str, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One form."""

    form: str
    bits_per_weight: float
    perplexity: dict[str, float]


class Measurement:
    """The two models, and the windows that they are rounded with and evaluated on."""

    def __init__(self, pruned: Path, setting: Setting) -> None:
        self._artifact = Artifact.open(pruned)
        self._setting = setting
        self._recipe = recipe_from_mapping(setting.recipe)
        self._tokenizer = load_model(pruned, dtype=torch.float32).tokenizer

    def run(self, form: Form) -> Run:
        """Round and evaluate."""
        source = self._artifact.path if form.pruned else self._artifact.manifest.source
        loaded = load_model(source, dtype=torch.float32)
        if form.quantization and form.corrected:
            self._correct(loaded, form)
        elif form.quantization:
            for linear in self._operators(loaded.model):
                weight, how = linear.weight.data, form.quantization
                linear.weight.data = rounded(weight, scales_of(weight, how), how)
        with rounded_inputs(self._operators(loaded.model) if form.inputs else []):
            found = {
                name: perplexity(loaded.model, self._windows(text)).perplexity
                for name, text in self._setting.texts.items()
            }
        return Run(form=form.name, bits_per_weight=form.bits_per_weight(), perplexity=found)

    def _correct(self, loaded: LoadedModel, form: Form) -> None:
        spec = replace(self._recipe.calibration, scrambled=0)
        recipe = replace(
            rounding_recipe(replace(self._recipe, quantization=form.quantization)),
            pattern=TWO_FOUR if form.pruned else Anywhere(),
        )
        calibration = load_calibration(spec, loaded.tokenizer, None)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            prune_model(
                loaded.model,
                recipe,
                calibration,
                store=LayerFolder(folder / "layers", folder, PruneProgress()),
                progress=PruneProgress(),
                device=torch.device("cpu"),
                structure=trace_structure(loaded.model, calibration.windows[0][:8]),
            )

    def _operators(self, model: nn.Module) -> list[nn.Linear]:
        found = [model.get_submodule(name) for name in self._artifact.manifest.pruned]
        return [module for module in found if isinstance(module, nn.Linear)]

    def _windows(self, text: str | None) -> list[Tensor]:
        return evaluation_windows(
            self._tokenizer,
            read_text(text, column=None, packaged="evaluation"),
            sequence_length=self._setting.evaluation_length,
            samples=self._setting.evaluation_windows,
        )


@contextmanager
def rounded_inputs(linears: list[nn.Linear]) -> Iterator[None]:
    """Round what enters each of ``linears`` to int8, with a scale for each token."""

    def round_tokens(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flat = inputs[0].flatten(0, -2)
        return (rounded(flat, scales_of(flat, _INT8), _INT8).view_as(inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(linear.register_forward_pre_hook(round_tokens).remove)
        yield


def quantised_table(result: Result) -> str:
    """Return the perplexity of each form, and its gap to the dense model in nats."""
    dense, *_ = result["runs"]
    texts = list(dense["perplexity"])
    rows = [head("weights", "bits a weight", *texts, *(f"gap, {text}" for text in texts))]
    for run in result["runs"]:
        found, before = run["perplexity"], dense["perplexity"]
        gaps = (f"{math.log(found[text] / before[text]):.3f}" for text in texts)
        shown = (f"{found[text]:.2f}" for text in texts)
        rows.append(line(run["form"], f"{run['bits_per_weight']:g}", *shown, *gaps))
    setting, machine = result["setting"], result["machine"]
    note = (
        f"The 2:4 model was pruned by `{setting['recipe']['method']['name']}` on "
        f"{setting['calibration']['samples']} windows, on which errors of rounding were repaired, "
        f"too. Bits count codes, places and the scales of groups. {setting['evaluation_windows']} "
        f"windows of {setting['evaluation_length']} tokens a text, computed in float32; "
        f"{processor_and_software(machine)}"
    )
    return "\n".join([*rows, "", note])


@click.command()
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--result", required=True, help="File name in benchmarks/results/.")
@click.option("--windows", default=30, show_default=True, help="Evaluation windows a text.")
@click.option("--sequence-length", default=512, show_default=True)
@text_option
@click.option("--smoke", is_flag=True, help="Two forms: does the script run?")
def main(
    *,
    pruned: Path,
    result: str,
    windows: int,
    sequence_length: int,
    texts: dict[str, str | None],
    smoke: bool,
) -> None:
    quiet_libraries()
    manifest = Artifact.open(pruned).manifest
    setting = Setting(
        model=manifest.source,
        recipe=manifest.recipe,
        calibration=manifest.calibration,
        evaluation_windows=windows,
        evaluation_length=sequence_length,
        texts=texts,
    )
    path = RESULTS / result
    runs = [Run(**run) for run in stored(path, setting)]
    measurement = Measurement(pruned, setting)
    for form in [FORMS[0], FORMS[-1]] if smoke else FORMS:
        if any(run.form == form.name for run in runs):
            continue
        runs.append(measurement.run(form))
        if not smoke:
            write_result(path, setting, runs=runs)
        click.echo(json.dumps(asdict(runs[-1])), err=True)


if __name__ == "__main__":
    main()
