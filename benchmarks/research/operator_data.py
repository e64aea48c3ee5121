"""What experiments on single operators and decoder layers measure on.

Operators are named ``LAYER.NAME`` such as ``15.self_attn.o_proj``. Their inputs are those of the
dense model on windows of the packaged calibration text; the held-out windows are drawn together
with them, so that no two overlap.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import (
    capture_layer_calls,
    entering_states,
    layer_inputs,
    layer_weight,
    run_layer,
)
from sparseserve.models.loading import load_model
from sparseserve.models.structure import LayerStructure, OperatorGroup, trace_structure
from sparseserve.solvers.statistics import InputStatistics, StatisticsSum, relative_output_error
from sparseserve.text import calibration_windows, read_text

ROOT = Path(__file__).parents[2]
MODEL = "demo/models/smollm2-135m"
OPERATORS = (
    "3.self_attn.o_proj",
    "15.self_attn.q_proj",
    "15.self_attn.o_proj",
    "15.mlp.down_proj",
    "26.mlp.gate_proj",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How much text: ``samples`` windows to calibrate on and ``heldout`` others to judge by."""

    samples: int = 16
    heldout: int = 8
    length: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Errors:
    """``||W X - W0 X|| / ||W0 X||`` on the calibration tokens and on others."""

    calibration: float
    heldout: float


@dataclass(frozen=True, slots=True)
class OperatorData:
    """One linear operator.

    Attributes:
        name: ``LAYER.NAME``.
        weight: Dense weight, float32 ``[out, in]``.
        seen: Second moments of the calibration inputs.
        other: Second moments of the held-out inputs.
        inputs: The calibration inputs themselves, ``[tokens, in]``.
    """

    name: str
    weight: Tensor
    seen: InputStatistics
    other: InputStatistics
    inputs: Tensor

    def rows(self, count: int) -> OperatorData:
        """Return the operator with ``count`` of its outputs, spread evenly over all of them."""
        chosen = torch.arange(count) * len(self.weight) // count
        return OperatorData(self.name, self.weight[chosen], self.seen, self.other, self.inputs)

    def errors(self, weight: Tensor) -> Errors:
        """Judge a pruned ``weight``."""
        return Errors(
            relative_output_error(weight, self.weight, self.seen),
            relative_output_error(weight, self.weight, self.other),
        )


@dataclass(frozen=True, slots=True)
class LayerWindows:
    """A dense decoder layer and the hidden states ``[1, tokens, hidden]`` entering it."""

    number: int
    structure: LayerStructure
    module: nn.Module
    call: LayerCall
    seen: tuple[Tensor, ...]
    other: tuple[Tensor, ...]


def fixture_operator() -> OperatorData:
    """Return the operator of ``tests/data``.

    Only the second moments of its inputs are kept there; the factor of the Gram matrix stands in
    for the inputs, since it has the same one.
    """
    tensors = load_file(ROOT / "tests" / "data" / "operator.safetensors")
    seen, other = (tensors[name].double() for name in ("gram", "gram_heldout"))
    ridge = 1e-6 * seen.diagonal().mean() * torch.eye(len(seen), dtype=torch.float64)
    return OperatorData(
        "15.self_attn.o_proj",
        tensors["weight"],
        InputStatistics(seen, seen, seen, 0),
        InputStatistics(other, other, other, 0),
        torch.linalg.cholesky(seen + ridge, upper=True).float(),
    )


def small_operator() -> OperatorData:
    """Return a corner of :func:`fixture_operator`, 16 outputs of 64 inputs, for smoke runs."""
    whole, columns = fixture_operator(), 64
    seen, other = (part.gram[:columns, :columns] for part in (whole.seen, whole.other))
    return OperatorData(
        whole.name,
        whole.weight[:16, :columns],
        InputStatistics(seen, seen, seen, 0),
        InputStatistics(other, other, other, 0),
        whole.inputs[:, :columns],
    )


def decoder_layers(
    model: str, numbers: Collection[int], windows: Windows
) -> Iterator[LayerWindows]:
    """Yield the decoder layers of those ``numbers`` in the order in which they run."""
    loaded = load_model(model, dtype=torch.float32)
    drawn = calibration_windows(
        loaded.tokenizer,
        read_text(None),
        samples=windows.samples + windows.heldout,
        sequence_length=windows.length,
        seed=windows.seed,
    )
    structure = trace_structure(loaded.model, drawn[0][:8])
    calls = capture_layer_calls(loaded.model, structure, drawn)
    hidden = list(entering_states(loaded.model, structure, drawn))
    # Windows come in the order of the text; which are held out is drawn.
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(windows.seed))
    seen, other = order[: windows.samples].tolist(), order[windows.samples :].tolist()
    for number in range(max(numbers) + 1):
        layer, call = structure.layers[number], calls[number]
        module = loaded.model.get_submodule(layer.name)
        click.echo(f"{layer.name}", err=True)
        if number in numbers:
            yield LayerWindows(
                number,
                layer,
                module,
                call,
                tuple(hidden[index] for index in seen),
                tuple(hidden[index] for index in other),
            )
        hidden = [run_layer(module, window, call) for window in hidden]


def model_operators(
    model: str, names: Sequence[str] = OPERATORS, windows: Windows | None = None
) -> tuple[OperatorData, ...]:
    """Return operators of a ``model`` folder with their inputs in the dense model."""
    wanted: dict[int, list[str]] = {}
    for name in names:
        number, _, operator = name.partition(".")
        wanted.setdefault(int(number), []).append(operator)
    found = {}
    for layer in decoder_layers(model, wanted, windows or Windows()):
        for group in layer.structure.groups:
            chosen = [item for item in group.operators if item.name in wanted[layer.number]]
            if not chosen:
                continue
            seen, inputs = _statistics(layer, group, layer.seen)
            other, _ = _statistics(layer, group, layer.other)
            for item in chosen:
                name = f"{layer.number}.{item.name}"
                weight = layer_weight(layer.module, item).float().clone()
                found[name] = OperatorData(name, weight, seen, other, inputs)
    return tuple(found[name] for name in names)


def _statistics(
    layer: LayerWindows, group: OperatorGroup, hidden: Sequence[Tensor]
) -> tuple[InputStatistics, Tensor]:
    total = StatisticsSum(group.in_features, corrected=False, device=torch.device("cpu"))
    kept = []
    for window in hidden:
        inputs, _ = layer_inputs(layer.module, window, layer.call, [group])
        total.add(inputs[0])
        kept.append(inputs[0])
    return total.finish(), torch.cat(kept)
