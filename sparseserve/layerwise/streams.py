"""A decoder layer at work, and the streams of hidden states that run through the layers.

There is a dense stream where anything is compared with the dense model, and a pruned one where a
layer sees how the layers before it were pruned. Both wait on the disk, so memory does not grow
with the number of calibration windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.checkpoint.tensors import writing
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import copy_layer, group_input, layer_inputs, run_layer
from sparseserve.models.structure import LayerStructure, OperatorGroup


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A decoder layer about to be pruned.

    Attributes:
        layer: Its structure.
        dense: A dense copy on ``device`` in ``dtype``.
        call: Its other arguments, likewise.
        dense_hidden: What enters it in the dense model, ``[1, tokens, hidden]`` a window; None
            where nothing is compared with the dense model.
        dense_output: What leaves it there, likewise.
        dense_inputs: What each of the layer's groups reads there, window by window; empty where
            running the layer again costs less than keeping it.
        pruned_hidden: What enters it in the model pruned so far, window by window; None where
            layers are pruned independently of each other and both are one.
        device: Where it runs.
        dtype: What it computes in.
        storage_dtype: What its weights are stored in.
        scrambled: How many of the windows, the first ones, are scrambled text.
        reading_weights: How much a squared error of each feature of its output counts, ``[hidden]``
            on the CPU; None is alike.
        predict: What turns its output into logits, on ``device``; None for all layers but the last.
    """

    layer: LayerStructure
    dense: nn.Module
    call: LayerCall
    dense_hidden: HiddenStates | None
    dense_output: HiddenStates | None
    dense_inputs: tuple[HiddenStates, ...]
    pruned_hidden: HiddenStates | None
    device: torch.device
    dtype: torch.dtype
    storage_dtype: torch.dtype
    scrambled: int = 0
    reading_weights: Tensor | None = None
    predict: Callable[[Tensor], Tensor] | None = None

    @property
    def entering(self) -> HiddenStates:
        """What enters the pruned layer, window by window."""
        entering = self.dense_hidden if self.pruned_hidden is None else self.pruned_hidden
        assert entering is not None
        return entering

    def dense_windows(self) -> Iterator[Tensor]:
        """Yield what enters the dense layer, one window at a time on the device."""
        assert self.dense_hidden is not None
        for window in self.dense_hidden:
            yield window.to(self.device, self.dtype)

    def pruned_windows(self) -> Iterator[Tensor]:
        """Yield what enters the pruned layer, one window at a time on the device."""
        for window in self.entering:
            yield window.to(self.device, self.dtype)

    def dense_group_inputs(self, group: OperatorGroup) -> Iterator[Tensor]:
        """Yield what ``group`` reads in the dense layer, ``[tokens, in_features]`` a window."""
        if self.dense_inputs:
            yield from self.dense_inputs[self.layer.groups.index(group)]
            return
        for window in self.dense_windows():
            yield group_input(self.dense, window, self.call, group)


@dataclass(frozen=True, slots=True)
class HiddenStreams:
    """What enters the next decoder layer.

    Attributes:
        folder: Where the files are.
        dense: In the dense model; None where nothing is compared with it.
        pruned: In the model pruned so far; None where layers are pruned independently.
        keep_inputs: Whether what each group of operators reads in the dense layer is kept, too.
        scrambled: How many of the windows, the first ones, are scrambled text.
    """

    folder: Path
    dense: HiddenStates | None
    pruned: HiddenStates | None
    keep_inputs: bool
    scrambled: int = 0

    @classmethod
    def start(
        cls,
        folder: Path,
        entering: Iterable[Tensor],
        *,
        dense: bool,
        chained: bool,
        keep_inputs: bool,
        scrambled: int = 0,
    ) -> HiddenStreams:
        """Begin with what enters the first layer.

        Args:
            folder: Where the files go; made here.
            entering: What enters the first layer, window by window.
            dense: Whether there is a dense stream.
            chained: Whether there is a pruned stream; one of the two there must be.
            keep_inputs: Whether what the groups of the dense layers read is kept.
            scrambled: How many of the windows, the first ones, are scrambled text.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        with writing(folder):
            folder.mkdir()
        first = HiddenStates.write(folder / "entering", entering)
        return cls(
            folder, first if dense else None, first if chained else None, keep_inputs, scrambled
        )

    def without_scrambled(self) -> HiddenStreams:
        """Return what the other windows carry into the next layer."""
        return replace(
            self,
            dense=None if self.dense is None else self.dense.without_first(self.scrambled),
            pruned=None if self.pruned is None else self.pruned.without_first(self.scrambled),
            scrambled=0,
        )

    def enter(
        self, module: nn.Module, layer: LayerStructure, call: LayerCall, device: torch.device
    ) -> LayerRun:
        """Copy the dense ``module`` to ``device`` and run it, where there is a dense stream.

        Raises:
            NumericalError: Its output is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        storage = next(module.parameters()).dtype
        # The 16-bit arithmetic of CPUs is slow where it is exact and inexact where it is not.
        dtype = torch.float32 if device.type == "cpu" else storage
        run = LayerRun(
            layer=layer,
            dense=copy_layer(module, device, dtype),
            call=call.to(device, dtype),
            dense_hidden=self.dense,
            dense_output=None,
            dense_inputs=(),
            pruned_hidden=self.pruned,
            device=device,
            dtype=dtype,
            storage_dtype=storage,
            scrambled=self.scrambled,
        )
        return run if self.dense is None else self._with_dense_outputs(run)

    def _with_dense_outputs(self, run: LayerRun) -> LayerRun:
        groups = run.layer.groups if self.keep_inputs else ()
        output, *inputs = HiddenStates.write_several(
            [
                self.folder / f"dense-{run.layer.name}",
                *(self.folder / f"inputs-{number}" for number in range(len(groups))),
            ],
            (
                _output_and_inputs(run.dense, window, run.call, groups)
                for window in run.dense_windows()
            ),
        )
        return replace(run, dense_output=output, dense_inputs=tuple(inputs))

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
        done = (self.dense, self.pruned, *run.dense_inputs)
        for path in {stream.path for stream in done if stream is not None}:
            path.unlink()
        return replace(self, dense=run.dense_output, pruned=pruned)


def _output_and_inputs(
    layer: nn.Module, window: Tensor, call: LayerCall, groups: Sequence[OperatorGroup]
) -> list[Tensor]:
    inputs, output = layer_inputs(layer, window, call, groups)
    return [output, *inputs]
