"""A decoder layer at work, and the streams of hidden states that run through the layers.

There is a dense stream and, where layers correct each other's errors, a pruned one. Both wait on
the disk, so memory does not grow with the number of calibration windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseserve.checkpoint import writing
from sparseserve.hidden_states import HiddenStates
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import copy_layer, run_layer
from sparseserve.models.structure import LayerStructure


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A decoder layer about to be pruned.

    Attributes:
        layer: Its structure.
        dense: A dense copy on ``device`` in ``dtype``.
        call: Its other arguments, likewise.
        dense_hidden: What enters it in the dense model, ``[1, tokens, hidden]`` a window.
        dense_output: What leaves it there.
        pruned_hidden: What enters it in the model pruned so far, window by window; None where
            layers are pruned independently of each other and both are one.
        device: Where it runs.
        dtype: What it computes in.
        storage_dtype: What its weights are stored in.
    """

    layer: LayerStructure
    dense: nn.Module
    call: LayerCall
    dense_hidden: HiddenStates
    dense_output: HiddenStates
    pruned_hidden: HiddenStates | None
    device: torch.device
    dtype: torch.dtype
    storage_dtype: torch.dtype

    @property
    def entering(self) -> HiddenStates:
        """What enters the pruned layer, window by window."""
        return self.dense_hidden if self.pruned_hidden is None else self.pruned_hidden

    def dense_windows(self) -> Iterator[Tensor]:
        """Yield what enters the dense layer, one window at a time on the device."""
        for window in self.dense_hidden:
            yield window.to(self.device, self.dtype)

    def pruned_windows(self) -> Iterator[Tensor]:
        """Yield what enters the pruned layer, one window at a time on the device."""
        for window in self.entering:
            yield window.to(self.device, self.dtype)


@dataclass(frozen=True, slots=True)
class HiddenStreams:
    """What enters the next decoder layer.

    Attributes:
        folder: Where the files are.
        dense: In the dense model.
        pruned: In the model pruned so far; None where layers are pruned independently.
    """

    folder: Path
    dense: HiddenStates
    pruned: HiddenStates | None

    @classmethod
    def start(cls, folder: Path, entering: Iterable[Tensor], *, chained: bool) -> HiddenStreams:
        """Begin with what enters the first layer; ``chained`` asks for the pruned stream.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        with writing(folder):
            folder.mkdir()
        dense = HiddenStates.write(folder / "dense-0", entering)
        return cls(folder, dense, dense if chained else None)

    def enter(
        self, module: nn.Module, layer: LayerStructure, call: LayerCall, device: torch.device
    ) -> LayerRun:
        """Copy the dense ``module`` to ``device`` and run it.

        Raises:
            NumericalError: Its output is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        storage = next(module.parameters()).dtype
        # The 16-bit arithmetic of CPUs is slow where it is exact and inexact where it is not.
        dtype = torch.float32 if device.type == "cpu" else storage
        copied, call = copy_layer(module, device, dtype), call.to(device, dtype)
        output = HiddenStates.write(
            self.folder / f"dense-{layer.name}",
            (run_layer(copied, window.to(device, dtype), call) for window in self.dense),
        )
        return LayerRun(
            layer, copied, call, self.dense, output, self.pruned, device, dtype, storage
        )

    def leave(self, run: LayerRun, module: nn.Module) -> HiddenStreams:
        """Run the pruned ``module``, where there is a pruned stream, and forget what entered it.

        Raises:
            NumericalError: Its output is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        pruned = None
        if self.pruned is not None:
            copied = copy_layer(module, run.device, run.dtype)
            pruned = HiddenStates.write(
                self.folder / f"pruned-{run.layer.name}",
                (run_layer(copied, window, run.call) for window in run.pruned_windows()),
            )
        for path in {stream.path for stream in (self.dense, self.pruned) if stream}:
            path.unlink()
        return HiddenStreams(self.folder, run.dense_output, pruned)
