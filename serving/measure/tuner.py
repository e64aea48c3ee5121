"""Kernel times of a checkpoint measured ahead, and what they say: where 2:4 pays.

An engine is started as a server would start it: its layers are timed while they are loaded, and the
times stay on disk for the next start. What was chosen is then read from the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparseserve.errors import ServingError
from sparseserve.machine import Machine, installed_versions, this_machine
from sparseserve.serving.kernels import DENSE
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options
from sparseserve.serving.measure.layer_choice import LayerChoice

_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TunedLayers:
    """Layers of one shape that are run alike.

    Attributes:
        names: vLLM's names of the layers.
        layer: Rows, columns and dtypes.
        plan: Which kernel runs which batch, in words.
        refusals: Why other kernels cannot run them, by name.
        kernels: The kernel of each timed batch size; empty where there was no choice.
        seconds: Its time for one layer, by batch size.
        dense_seconds: Time of the engine's own dense product, by batch size.
    """

    names: tuple[str, ...]
    layer: str
    plan: str
    refusals: dict[str, str]
    kernels: dict[int, str]
    seconds: dict[int, float]
    dense_seconds: dict[int, float]

    @property
    def compared(self) -> bool:
        """Whether there was a choice, and dense was part of it."""
        return bool(self.seconds and self.dense_seconds)

    def speedup(self, batch: int) -> float:
        """Return how many times faster than dense these layers are."""
        return self.dense_seconds[batch] / self.seconds[batch]


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What tuning found for a checkpoint on a machine."""

    folder: Path
    layers: tuple[TunedLayers, ...]
    machine: Machine
    versions: dict[str, str]
    date: str

    @property
    def speedup(self) -> dict[int, float]:
        """By batch size: the dense time of all timed layers together, over theirs."""
        timed = [layers for layers in self.layers if layers.compared]
        batches = timed[0].seconds if timed else ()
        return {
            batch: sum(len(found.names) * found.dense_seconds[batch] for found in timed)
            / sum(len(found.names) * found.seconds[batch] for found in timed)
            for batch in batches
        }

    def to_json(self) -> dict[str, object]:
        """Return JSON data."""
        return {
            "path": str(self.folder),
            "layers": [asdict(layers) for layers in self.layers],
            "speedup": self.speedup,
            "machine": asdict(self.machine),
            "versions": self.versions,
            "date": self.date,
        }


def tune(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    again: bool = False,
) -> TuningReport:
    """Time the kernels of every 2:4 layer that has no times yet, and report what is chosen.

    Args:
        folder: A packed24 checkpoint, or a dense one with ``quantization``.
        dtype: To compute in; None is the checkpoint's where the machine has it, else float32.
        quantization: ``sparseserve`` for a dense checkpoint whose weights are 2:4.
        again: Whether to time layers that have times, too.

    Raises:
        ServingError: The checkpoint cannot be served, or has no 2:4 layers as it is.
        MissingExtraError: vLLM is not installed.
    """
    model = ServedModel.open(folder)
    if not model.packed_parameters and quantization is None:
        raise ServingError(
            f"{folder}: no layer is served as 2:4, so there is nothing to tune: prune it first, or "
            "give --quantization sparseserve if its weights are 2:4"
        )
    options = engine_options(
        model,
        max_model_len=_PROMPT_TOKENS,
        dtype=dtype,
        quantization=quantization,
        threads_of_server=True,
    )
    with Engine(options, measure_kernels=again) as engine:
        choices = engine.layer_choices()
    return TuningReport(
        folder=folder,
        layers=tuple(_grouped(choices)),
        machine=this_machine(),
        versions=installed_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _grouped(choices: Sequence[LayerChoice]) -> list[TunedLayers]:
    groups: dict[tuple[str, str], list[LayerChoice]] = {}
    for choice in choices:
        groups.setdefault((choice.layer, choice.plan), []).append(choice)
    return [
        TunedLayers(
            names=tuple(choice.name for choice in alike),
            layer=layer,
            plan=plan,
            refusals=alike[0].refusals,
            kernels=alike[0].kernels,
            seconds={
                batch: alike[0].times[kernel][batch] for batch, kernel in alike[0].kernels.items()
            },
            dense_seconds=alike[0].times.get(DENSE, {}),
        )
        for (layer, plan), alike in groups.items()
    ]
