"""How much a language model loses when one group of its operators is pruned and all else is dense.

The unit is what reads one input: query, key and value together, gate and up together. Serving
engines run these as one product, sparse only if all of it is (``serving/plugin/linear.py``).

Two prices are measured for every unit, on windows that pruning did not see:

* the rise of the mean negative log-likelihood of the next token, which is what a perplexity is
  made of, and
* the divergence KL(dense || pruned) of the predictions of the next token.

If the dense model predicts as often right as it says it does, the expectation of the first is the
second. But the first varies by the luck of the tokens: where a unit costs d nats, the difference
of two log-likelihoods varies by about sqrt(2 d) from token to token and the divergence only by
some d. So for the cheap units, which decide an allocation, the divergence says with thousands of
tokens what the likelihood would need many times as many for.

Of a model of L layers the unit in layer l needs only the layers from l on to run again: the layers
before it give back the hidden states they gave the dense model, which are kept for one layer at a
time (``windows * tokens * hidden`` numbers).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparseserve.errors import NumericalError
from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.plan import planned_operators
from sparseserve.models.hooks import ForwardStopped, hidden_output, hooks, run_model
from sparseserve.models.structure import LayerStructure, trace_structure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.retraining.losses import Example, dense_predictions, prediction_loss

# Next tokens whose probabilities are told apart in the divergence; the rest counts as one.
LIKELIEST = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSensitivity:
    """What pruning one unit alone costs.

    Attributes:
        operators: Full names of its linears.
        weights: Theirs together.
        loss_increases: Rise of the mean negative log-likelihood in each window, nats a token.
        divergences: Mean KL(dense || pruned) in each window, nats a token.
    """

    operators: tuple[str, ...]
    weights: int
    loss_increases: tuple[float, ...]
    divergences: tuple[float, ...]

    @property
    def loss_increase(self) -> float:
        """Mean over the windows."""
        return statistics.fmean(self.loss_increases)

    @property
    def divergence(self) -> float:
        """Mean over the windows."""
        return statistics.fmean(self.divergences)

    @property
    def label(self) -> str:
        """A short name: what the names share, and the last parts of all of them."""
        parents, leaves = zip(*(name.rpartition(".")[::2] for name in self.operators), strict=True)
        return f"{parents[0]}.{'+'.join(leaves)}" if len(set(parents)) == 1 else self.operators[0]

    @property
    def layer(self) -> int:
        """Number of its decoder layer, from 0: the first number in the names."""
        return next(int(part) for part in self.operators[0].split(".") if part.isdigit())

    @property
    def kind(self) -> str:
        """What it is called in every layer: the label after the layer's number."""
        return self.label.partition(f".{self.layer}.")[2]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UnitSensitivity:
        """Read back what ``dataclasses.asdict`` wrote."""
        return cls(
            operators=tuple(data["operators"]),
            weights=data["weights"],
            loss_increases=tuple(data["loss_increases"]),
            divergences=tuple(data["divergences"]),
        )


class SensitivityStore(Protocol):
    """Where pruned layers come from and measured ones are kept."""

    def pruned(self, layer: str) -> PrunedLayer:
        """Return a layer whose operators were all pruned, each for itself."""
        ...

    def load(self, layer: str) -> tuple[UnitSensitivity, ...] | None:
        """Return the units of a layer that was measured before, or None."""
        ...

    def save(self, layer: str, units: tuple[UnitSensitivity, ...]) -> None:
        """Keep the units of a layer."""
        ...


def measure_sensitivities(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    windows: Sequence[Tensor],
    store: SensitivityStore,
    on_layer: Callable[[str, int, int], None] = lambda name, number, total: None,
) -> tuple[UnitSensitivity, ...]:
    """Prune one unit of the dense ``model`` at a time and measure; ``model`` ends as it began.

    Args:
        model: On any device, in evaluation mode and without gradients. On a CPU let it be in
            float32: 16-bit arithmetic there is slow, and its errors hide the cheap units.
        recipe: Says which operators would be pruned.
        windows: Token ids ``[T]`` of one length.
        store: Gives the pruned layers and keeps what was measured.
        on_layer: Told the name and number, from 1, of every decoder layer, and how many there are.

    Raises:
        UnsupportedModelError: The structure of the model cannot be found.
        NumericalError: A loss is not finite; names the unit.
    """
    with unstacked_experts(model):
        return _measured(model, recipe, windows, store, on_layer)


def _measured(
    model: PreTrainedModel,
    recipe: PruneRecipe,
    windows: Sequence[Tensor],
    store: SensitivityStore,
    on_layer: Callable[[str, int, int], None],
) -> tuple[UnitSensitivity, ...]:
    structure = trace_structure(model, windows[0][:8])
    examples = [
        Example(window, dense)
        for window, dense in zip(windows, dense_predictions(model, windows, LIKELIEST), strict=True)
    ]
    dense_losses = [_losses(model, example)[0] for example in examples]
    modules = [model.get_submodule(layer.name) for layer in structure.layers]
    entering: list[object] = [None] * len(windows)
    found: list[UnitSensitivity] = []
    for number, layer in enumerate(structure.layers):
        on_layer(layer.name, number + 1, len(modules))
        before = modules[:number]
        units = store.load(layer.name)
        if units is None:
            tail = _Tail(model, before, entering, examples, dense_losses)
            units = tuple(_layer_units(tail, layer, recipe, store.pruned(layer.name)))
            store.save(layer.name, units)
        found += units
        if number + 1 < len(modules):
            entering = [
                _layer_output(model, before, output, modules[number], window)
                for output, window in zip(entering, windows, strict=True)
            ]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Tail:
    """The model from one layer on.

    Attributes:
        model: All of it.
        before: The layers that need not run.
        entering: What the last of them returns, for each window.
        examples: The windows and the dense predictions in them.
        dense_losses: Mean negative log-likelihood of the dense model in each window.
    """

    model: PreTrainedModel
    before: Sequence[nn.Module]
    entering: Sequence[object]
    examples: Sequence[Example]
    dense_losses: Sequence[float]

    def prices(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the rise of the loss and the divergence in each window, as the model is now."""
        increases, divergences = [], []
        for output, example, dense_loss in zip(
            self.entering, self.examples, self.dense_losses, strict=True
        ):
            with _returning(self.before, output):
                loss, divergence = _losses(self.model, example)
            increases.append(loss - dense_loss)
            divergences.append(divergence)
        return tuple(increases), tuple(divergences)


def _layer_units(
    tail: _Tail, layer: LayerStructure, recipe: PruneRecipe, pruned: PrunedLayer
) -> Iterator[UnitSensitivity]:
    module = tail.model.get_submodule(layer.name)
    planned = planned_operators(layer, recipe)
    for group in layer.groups:
        # An expert that no token reached was not pruned.
        operators = [
            operator
            for operator in group.operators
            if operator in planned and f"{operator.name}.weight" in pruned.parameters
        ]
        if not operators:
            continue
        names = tuple(layer.full_name(operator) for operator in operators)
        keys = [f"{operator.name}.weight" for operator in operators]
        weights = {key: pruned.parameters[key] for key in keys}
        try:
            with _replaced(module, weights):
                increases, divergences = tail.prices()
        except NumericalError as error:
            raise NumericalError(f"{names[0]}, pruned alone: {error}") from error
        yield UnitSensitivity(
            operators=names,
            weights=sum(weight.numel() for weight in weights.values()),
            loss_increases=increases,
            divergences=divergences,
        )


def _losses(model: PreTrainedModel, example: Example) -> tuple[float, float]:
    """Return the mean negative log-likelihood and the divergence, nats a token."""
    with torch.no_grad():
        loss = prediction_loss(model, example, distillation=1.0)
    values = torch.stack((loss.cross_entropy, loss.total))
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"the loss is {float(loss.cross_entropy)}: use --dtype float32")
    return float(loss.cross_entropy), float(loss.total)


@contextmanager
def _replaced(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters of ``layer`` have other ``values`` while the block runs."""
    kept = {name: layer.get_parameter(name).detach().clone() for name in values}
    try:
        _write(layer, values)
        yield
    finally:
        _write(layer, kept)


def _write(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        layer.get_parameter(name).detach().copy_(value)


@contextmanager
def _returning(layers: Sequence[nn.Module], output: object) -> Iterator[None]:
    """Let each of ``layers`` return ``output`` at once, without running, while the block runs."""

    def forward(*_args: object, **_kwargs: object) -> object:
        # A later layer may work in place on what it is given.
        if isinstance(output, Tensor):
            return output.clone()
        assert isinstance(output, tuple | list)
        return type(output)((output[0].clone(), *output[1:]))

    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, method in zip(layers, own, strict=True):
            if method is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = method


def _layer_output(
    model: PreTrainedModel,
    before: Sequence[nn.Module],
    entering: object,
    layer: nn.Module,
    window: Tensor,
) -> object:
    """Return what ``layer`` returns in the dense model: hidden states, alone or before others."""
    found: list[object] = []

    def record(_: nn.Module, args: tuple[object, ...], output: object) -> None:
        found.append(output)
        raise ForwardStopped

    with hooks([layer.register_forward_hook(record)]), _returning(before, entering):
        run_model(model, window[None])
    assert hidden_output(found[0]) is not None
    return found[0]
