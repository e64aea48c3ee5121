"""One decoder layer as data that can travel to another machine, and what is done with it there.

A task holds the dense layer, how it is called, and what enters it. The machine that takes it runs
the dense layer and prunes a copy by the very code of a run on one machine, so the result has the
same bytes. Nothing here knows who carries the task.
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.devices import arithmetic_of
from sparseserve.errors import ClusterError
from sparseserve.layerwise.layer import PrunedLayer, prune_layer
from sparseserve.layerwise.layer_calls import VaryingArguments
from sparseserve.layerwise.pipeline import LayerWork
from sparseserve.layerwise.preparation import Preparation
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.layerwise.reconstruction import OutputError
from sparseserve.layerwise.streams import HiddenStreams
from sparseserve.machine import give_back_freed_memory, installed_versions
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import copy_layer
from sparseserve.models.structure import LayerStructure
from sparseserve.recipe.settings import PruneRecipe

_CPU = torch.device("cpu")
_PACKAGES = ("sparseserve", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """All of a machine that decides the bytes of a layer pruned on it.

    Attributes:
        device: What computes, such as ``cpu, AVX512``.
        threads: Of one task: sums are split among them, and rounded accordingly.
        releases: Of the packages that compute.
    """

    device: str
    threads: int
    releases: tuple[str, ...]

    @classmethod
    def here(cls, device: torch.device, autocast_to: torch.dtype | None) -> Arithmetic:
        """Describe this process, the ``device`` it would use, and what rounds products there."""
        versions = installed_versions()
        releases = tuple(f"{name} {versions[name]}" for name in _PACKAGES)
        return cls(arithmetic_of(device, autocast_to), torch.get_num_threads(), releases)

    def __str__(self) -> str:
        return f"{self.device}, {', '.join(self.releases)}"


@dataclass(frozen=True, slots=True)
class Parcel:
    """Hidden states on their way to another machine.

    Attributes:
        states: Those of the sender.
        data: Their bytes; None if the machines share a disk, on which they stay.
    """

    states: HiddenStates
    data: NDArray[np.uint8] | None

    @classmethod
    def of(cls, states: HiddenStates, *, shared_disk: bool) -> Parcel:
        """Pack ``states``."""
        return cls(states, None if shared_disk else states.data())

    def unpacked(self, path: Path) -> HiddenStates:
        """Return the states, in the file ``path`` unless they lie on a shared disk.

        Raises:
            ArtifactError: The disk is full or cannot be written.
            ClusterError: This machine does not see the shared disk.
        """
        if self.data is not None:
            return self.states.written_to(path, self.data)
        if not self.states.path.is_file():
            raise ClusterError(
                f"{self.states.path}: node {platform.node()} has no such file: --shared-disk needs "
                "an output folder that all nodes have under one path; leave the option out"
            )
        return self.states


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTask:
    """A decoder layer to prune.

    Attributes:
        layer: Its structure.
        module: The dense layer in its stored dtype, on the CPU.
        call: Its other arguments in one window, on the CPU.
        entering: What enters it in the dense model.
        varying: What of its arguments depends on the tokens.
        scrambled: How many windows, the first ones, are scrambled text.
        keep_inputs: As in ``HiddenStreams``.
        recipe: How to prune.
        output_error: What training should lower, on the CPU; None for no training.
        preparation: What is done to it first.
        device: Where to prune: ``cpu`` or ``cuda``.
        arithmetic: What the result must be computed with.
    """

    layer: LayerStructure
    module: nn.Module
    call: LayerCall
    entering: Parcel
    varying: tuple[Parcel, ...]
    scrambled: int
    keep_inputs: bool
    recipe: PruneRecipe
    output_error: OutputError | None
    preparation: Preparation
    device: str
    arithmetic: Arithmetic


def layer_task(
    work: LayerWork, number: int, streams: HiddenStreams, *, shared_disk: bool
) -> LayerTask:
    """Return the task of a layer.

    Args:
        work: All layers, still dense.
        number: Which one, from 1.
        streams: What enters it.
        shared_disk: Whether hidden states stay where they are.
    """
    layer, call = work.structure.layers[number - 1], work.calls[number - 1]
    errors = None if work.errors is None else replace(work.errors, device=_CPU)
    return LayerTask(
        layer=layer,
        # The weights of a model are views of whole files; a copy travels without the rest.
        module=copy_layer(work.model.get_submodule(layer.name)),
        call=call,
        entering=Parcel.of(streams.required_dense, shared_disk=shared_disk),
        varying=tuple(
            Parcel.of(states, shared_disk=shared_disk)
            for states in streams.varying.calls(layer.name, call).varying
        ),
        scrambled=streams.scrambled,
        keep_inputs=work.streams.keep_inputs,
        recipe=work.recipe,
        output_error=None if errors is None else errors.of_layer(number),
        preparation=work.preparations[number - 1],
        device=work.device.type,
        arithmetic=Arithmetic.here(work.device, call.autocast_to),
    )


def prune_task(task: LayerTask) -> PrunedLayer:
    """Prune the layer of ``task`` on this machine.

    Raises:
        ClusterError: This machine would compute other bytes, or does not see a shared disk.
        NumericalError: Names the operator.
        ArtifactError: The disk of temporary files is full.
    """
    device = torch.device(task.device)
    torch.set_num_threads(task.arithmetic.threads)
    _require_same(task.arithmetic, Arithmetic.here(device, task.call.autocast_to))
    with tempfile.TemporaryDirectory(prefix="sparseserve-") as scratch:
        folder = Path(scratch)
        varying = [
            parcel.unpacked(folder / f"argument-{number}")
            for number, parcel in enumerate(task.varying)
        ]
        streams = HiddenStreams(
            folder,
            dense=task.entering.unpacked(folder / "entering"),
            pruned=None,
            keep_inputs=task.keep_inputs,
            scrambled=task.scrambled,
            varying=VaryingArguments({task.layer.name: tuple(varying)}),
        )
        context = streams.enter(task.module, task.layer, task.call, device)
        error = task.output_error.to(device) if task.output_error else None
        pruned = prune_layer(context, task.recipe, PruneProgress(), error, task.preparation)
    give_back_freed_memory()
    return pruned


def _require_same(wanted: Arithmetic, here: Arithmetic) -> None:
    if here != wanted:
        raise ClusterError(
            f"node {platform.node()} computes with {here}, the machine of the command with "
            f"{wanted}, so the result would depend on who prunes which layer: use nodes of one "
            "kind with the same releases"
        )
