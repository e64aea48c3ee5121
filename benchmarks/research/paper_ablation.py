"""What holds the published recipe back, and which single repair helps most?

FISTAPruner read to the letter (``fista-paper``), with one change at a time, beside SparseGPT and
the methods that have all repairs. Some decoder layers of the model are pruned to 2:4, each on the
dense model's hidden states and with error correction inside the layer; the others stay dense; then
the perplexity of the whole model is measured. Not all layers, because the literal recipe can take
thousands of steps for one operator. Runs already in the JSON are not repeated::

    python -m benchmarks.demo.assets smollm2
    python -m benchmarks.demo.assets wikipedia
    OMP_NUM_THREADS=1 python -m benchmarks.research.paper_ablation demo/models/smollm2-135m \
        --text speeches=packaged --text wikipedia=demo/texts/wikipedia-evaluation.txt
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness.evaluation_texts import text_option
from benchmarks.harness.machine import Machine
from benchmarks.harness.results import RESEARCH, stored, write_result
from benchmarks.research.gradient_blocks import Block, Weights, operator_by_operator
from benchmarks.research.operator_data import LayerWindows, Windows, decoder_layers
from sparseserve.cli.console import quiet_libraries
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.huggingface.opening import open_tokenizer
from sparseserve.models.layers import layer_weight, set_layer_weight
from sparseserve.models.loading import load_model
from sparseserve.models.model_folder import find_model_folder
from sparseserve.models.structure import Operator
from sparseserve.pruners.admm import Admm
from sparseserve.pruners.fista import Fista
from sparseserve.pruners.fista_paper import PaperFista
from sparseserve.pruners.protocol import PrunedWeight
from sparseserve.pruners.refit import refitted
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.recipe.toml import PRESETS
from sparseserve.solvers.problem import operator_problem
from sparseserve.solvers.statistics import InputStatistics
from sparseserve.sparsity import TWO_FOUR, SparsityPattern
from sparseserve.text import evaluation_windows, read_text

RESULT = RESEARCH / "paper-ablation.json"
LAYERS = (6, 18)
DAMPING = 0.01


class Method(Protocol):
    """What a pruner does, and the variants below."""

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight: ...


@dataclass(frozen=True, slots=True)
class RelativeLambda:
    """The first lambda and the interval in units of the operator's mean absolute target."""

    paper: PaperFista
    first: float = 0.1
    upper: float = 10.0

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        unit = float(operator_problem(dense_weight, statistics, damping=0.0).target.abs().mean())
        own = replace(self.paper, first_lambda=self.first * unit, upper_lambda=self.upper * unit)
        return own.prune(dense_weight, statistics, pattern)


@dataclass(frozen=True, slots=True)
class ThenRefit:
    """Least squares on the mask that the method ends with."""

    method: Method
    iterations: int = 40

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        start = self.method.prune(dense_weight, statistics, pattern)
        problem = operator_problem(dense_weight, statistics, DAMPING)
        return refitted(start, problem, self.iterations)


@dataclass(frozen=True, slots=True)
class ScaledColumns:
    """The method in coordinates in which every input has unit energy."""

    method: Method

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        energy = statistics.gram.diagonal()
        scale = energy.clamp(min=1e-6 * float(energy.mean())).sqrt()
        square = torch.outer(scale, scale)
        scaled = _changed(statistics, lambda moment: moment / square)
        found = self.method.prune(dense_weight * scale.float(), scaled, pattern)
        return replace(found, weight=found.weight / scale.float())


@dataclass(frozen=True, slots=True)
class Damped:
    """The method with a pull towards the dense weight."""

    method: Method

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        ridge = DAMPING * statistics.gram.diagonal().mean() * torch.eye(len(statistics.gram))
        damped = _changed(statistics, lambda moment: moment + ridge)
        return self.method.prune(dense_weight, damped, pattern)


@dataclass(frozen=True, slots=True)
class Uncorrected:
    """The method on the dense layer's inputs."""

    method: Method

    def prune(
        self, dense_weight: Tensor, statistics: InputStatistics, pattern: SparsityPattern
    ) -> PrunedWeight:
        dense = statistics.dense_gram
        own = InputStatistics(dense, dense, dense, statistics.tokens)
        return self.method.prune(dense_weight, own, pattern)


def _changed(statistics: InputStatistics, change: Callable[[Tensor], Tensor]) -> InputStatistics:
    return InputStatistics(
        change(statistics.gram),
        change(statistics.cross),
        change(statistics.dense_gram),
        statistics.tokens,
    )


PAPER = PaperFista()
METHODS: dict[str, Method] = {
    "sparsegpt, no correction": Uncorrected(SparseGPT()),
    "sparsegpt": SparseGPT(),
    "paper": PAPER,
    "paper, start SparseGPT": PaperFista(warm_start="sparsegpt"),
    "paper, start ADMM": PaperFista(warm_start="admm"),
    "paper, small gains end it": PRESETS["paper"].pruner,
    "paper, relative lambda": RelativeLambda(PAPER),
    "paper, then refit": ThenRefit(PAPER),
    "paper, scaled columns": ScaledColumns(PAPER),
    "paper, damping": Damped(PAPER),
    "all repairs, start Wanda": Fista(warm_start="wanda"),
    "all repairs, start SparseGPT": Fista(warm_start="sparsegpt"),
    "all repairs, start ADMM": Fista(),
    "admm": Admm(),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One method: perplexity by text, seconds of processor time, products with the Gram matrix.

    ``commit`` is that of the program that measured it.
    """

    method: str
    perplexity: dict[str, float]
    seconds: float
    gram_products: int
    commit: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole dense model, and windows of every text."""

    model: PreTrainedModel
    windows: dict[str, list[Tensor]]

    def perplexities(
        self, pruned: dict[str, Weights], layers: Sequence[LayerWindows]
    ) -> dict[str, float]:
        """Return the perplexity of every text with the weights ``pruned`` by layer name."""
        for layer in layers:
            module = self.model.get_submodule(layer.structure.name)
            for operator in layer.structure.operators:
                dense = layer_weight(layer.module, operator)
                weights = pruned.get(layer.structure.name, {})
                set_layer_weight(module, operator, weights.get(operator.name, dense))
        return {
            name: perplexity(self.model, each).perplexity for name, each in self.windows.items()
        }


def pruned_layer(layer: LayerWindows, method: Method) -> tuple[Weights, int]:
    """Prune the operators of a layer in the order of the data; return them and the products."""
    products = []

    def solve(operator: Operator, statistics: InputStatistics) -> Tensor:
        dense = layer_weight(layer.module, operator)
        found = method.prune(dense, statistics, TWO_FOUR)
        products.append(found.gram_products)
        return found.weight

    return operator_by_operator(Block(layer, (), {}), {}, solve), sum(products)


def measure(name: str, layers: Sequence[LayerWindows], evaluation: Evaluation) -> Run:
    """Prune all ``layers`` by one method and measure the model."""
    pruned, products, clock = {}, 0, time.process_time()
    for layer in layers:
        pruned[layer.structure.name], taken = pruned_layer(layer, METHODS[name])
        products += taken
    seconds = time.process_time() - clock
    return Run(
        name, evaluation.perplexities(pruned, layers), seconds, products, Machine.here().commit
    )


@click.command()
@click.argument("model")
@click.option("--samples", default=16, show_default=True, help="Calibration windows.")
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Evaluation windows a text.")
@click.option("--layer", "numbers", multiple=True, type=int, default=LAYERS, show_default=True)
@text_option
@click.option("--only", multiple=True, help="Names of methods; default: all.")
@click.option("--smoke", is_flag=True, help="Nothing is written.")
def main(
    *,
    model: str,
    samples: int,
    sequence_length: int,
    windows: int,
    numbers: tuple[int, ...],
    texts: dict[str, str | None],
    only: tuple[str, ...],
    smoke: bool,
) -> None:
    quiet_libraries()
    drawn = Windows(samples=samples, heldout=1, length=sequence_length)
    setting = {
        "model": model,
        "layers": list(numbers),
        "calibration": asdict(drawn),
        "texts": dict(texts),
        "evaluation_windows": windows,
    }
    runs = [] if smoke else [Run(**row) for row in stored(RESULT, setting, "rows")]
    layers = list(decoder_layers(model, numbers, drawn))
    tokenizer = open_tokenizer(find_model_folder(model))
    evaluation = Evaluation(
        load_model(model, dtype=torch.float32).model,
        {
            name: evaluation_windows(
                tokenizer,
                read_text(text, packaged="evaluation"),
                sequence_length=sequence_length,
                samples=windows,
            )
            for name, text in texts.items()
        },
    )
    if not any(run.method == "dense" for run in runs):
        runs.append(
            Run("dense", evaluation.perplexities({}, layers), 0.0, 0, Machine.here().commit)
        )
    for name in only or METHODS:
        if any(run.method == name for run in runs):
            continue
        runs.append(measure(name, layers, evaluation))
        click.echo(json.dumps(asdict(runs[-1])), err=True)
        if not smoke:
            write_result(RESULT, setting, rows=runs)


if __name__ == "__main__":
    main()
