"""A decoder layer at work, and the streams of hidden states that run through the layers.

There is a dense stream where anything is compared with the dense model, and a pruned one where a
layer sees how the layers before it were pruned. Both wait on the disk, so memory does not grow
with the number of calibration windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.checkpoint.tensors import writing
from sparseserve.devices import pruning_dtype
from sparseserve.layerwise.layer_calls import LayerCalls, VaryingArguments
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import copy_layer, group_input, layer_inputs, run_layer
from sparseserve.models.structure import LayerStructure, ModelStructure, OperatorGroup


@dataclass(frozen=True, slots=True)
class DensePart:
    """What happens in the dense model at one decoder layer, window by window.

    Attributes:
        entering: What enters the layer, ``[1, tokens, hidden]`` a window.
        leaving: What leaves it, likewise.
        inputs: What each of the layer's common groups reads, ``[tokens, in_features]`` a window;
            empty where running the layer again costs less than keeping it.
    """

    entering: HiddenStates
    leaving: HiddenStates
    inputs: tuple[HiddenStates, ...]


@dataclass(frozen=True, slots=True)
class LayerContext:
    """All that pruning one decoder layer needs to know.

    Attributes:
        layer: Its structure.
        module: A dense copy on ``device`` in ``dtype``.
        calls: Its other arguments in each window, likewise.
        dense: What happens in the dense model; None where nothing is compared with it.
        entering: What enters the pruned layer, ``[1, tokens, hidden]`` a window. Where layers are
            pruned independently of each other, it is what enters the dense one.
        device: Where it runs.
        dtype: What it computes in.
        storage_dtype: What its weights are stored in.
        scrambled: How many of the windows, the first ones, are scrambled text.
    """

    layer: LayerStructure
    module: nn.Module
    calls: LayerCalls
    dense: DensePart | None
    entering: HiddenStates
    device: torch.device
    dtype: torch.dtype
    storage_dtype: torch.dtype
    scrambled: int

    @property
    def required_dense(self) -> DensePart:
        """The dense part, for what only works with one.

        Raises:
            ValueError: There is none: the streams were begun without ``dense``.
        """
        if self.dense is None:
            raise ValueError(f"{self.layer.name}: nothing of the dense model was kept")
        return self.dense

    @property
    def call(self) -> LayerCall:
        """The call of the first window."""
        return self.calls[0]

    def windows(self, hidden: HiddenStates) -> Iterator[tuple[Tensor, LayerCall]]:
        """Yield each window of ``hidden`` as the layer can take it, and how it is called then."""
        for number, window in enumerate(hidden):
            yield window.to(self.device, self.dtype), self.calls[number]

    def dense_group_inputs(self, group: OperatorGroup) -> Iterator[Tensor]:
        """Yield what ``group`` reads in the dense layer, ``[tokens, in_features]`` a window."""
        dense = self.required_dense
        if dense.inputs:
            yield from dense.inputs[self.layer.common_groups.index(group)]
            return
        for window, call in self.windows(dense.entering):
            yield group_input(self.module, window, call, group)


@dataclass(frozen=True, slots=True)
class HiddenStreams:
    """What enters the next decoder layer.

    Attributes:
        folder: Where the files are.
        dense: In the dense model; None where nothing is compared with it.
        pruned: In the model pruned so far; None where layers are pruned independently.
        keep_inputs: Whether what each group of operators reads in the dense layer is kept, too.
        scrambled: As in ``LayerContext``.
        varying: What the layers are given besides, where that depends on the tokens.
    """

    folder: Path
    dense: HiddenStates | None
    pruned: HiddenStates | None
    keep_inputs: bool
    scrambled: int = 0
    varying: VaryingArguments = field(default_factory=VaryingArguments)

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
            scrambled: As in ``LayerContext``.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        with writing(folder):
            folder.mkdir()
        first = HiddenStates.write(folder / "entering", entering)
        return cls(
            folder, first if dense else None, first if chained else None, keep_inputs, scrambled
        )

    @property
    def required_dense(self) -> HiddenStates:
        """The dense stream, for what only works with one.

        Raises:
            ValueError: There is none.
        """
        if self.dense is None:
            raise ValueError("the streams were begun without a dense one")
        return self.dense

    def recording(
        self,
        model: nn.Module,
        structure: ModelStructure,
        calls: Sequence[LayerCall],
        windows: Sequence[Tensor],
    ) -> HiddenStreams:
        """Return the streams with what else the layers of the dense ``model`` are given.

        Args:
            model: In evaluation mode.
            structure: Its layers.
            calls: How they are called in one window.
            windows: Token ids ``[T]`` of all windows.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        varying = VaryingArguments.record(self.folder, model, structure, calls, windows)
        return replace(self, varying=varying)

    def without_scrambled(self) -> HiddenStreams:
        """Return what the other windows carry into the next layer."""
        return replace(
            self,
            dense=None if self.dense is None else self.dense.without_first(self.scrambled),
            pruned=None if self.pruned is None else self.pruned.without_first(self.scrambled),
            scrambled=0,
            varying=self.varying.without_first(self.scrambled),
        )

    def enter(
        self, module: nn.Module, layer: LayerStructure, call: LayerCall, device: torch.device
    ) -> LayerContext:
        """Copy the dense ``module`` to ``device`` and run it, where there is a dense stream.

        Raises:
            NumericalError: Its output is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        storage = next(module.parameters()).dtype
        dtype = pruning_dtype(storage, device)
        copied = copy_layer(module, device, dtype)
        calls = self.varying.calls(layer.name, call.to(device, dtype))
        dense = None
        if self.dense is not None:
            windows = (window.to(device, dtype) for window in self.dense)
            dense = self._dense_part(self.dense, copied, windows, layer, calls)
        entering = self.dense if self.pruned is None else self.pruned
        if entering is None:
            raise ValueError("the streams were begun without a dense and without a pruned one")
        return LayerContext(
            layer=layer,
            module=copied,
            calls=calls,
            dense=dense,
            entering=entering,
            device=device,
            dtype=dtype,
            storage_dtype=storage,
            scrambled=self.scrambled,
        )

    def _dense_part(
        self,
        entering: HiddenStates,
        module: nn.Module,
        windows: Iterable[Tensor],
        layer: LayerStructure,
        calls: LayerCalls,
    ) -> DensePart:
        groups = layer.common_groups if self.keep_inputs else ()
        leaving, *inputs = HiddenStates.write_several(
            [
                self.folder / f"dense-{layer.name}",
                *(self.folder / f"inputs-{number}" for number in range(len(groups))),
            ],
            (
                _output_and_inputs(module, window, calls[number], groups)
                for number, window in enumerate(windows)
            ),
        )
        return DensePart(entering, leaving, tuple(inputs))

    def leave(self, context: LayerContext, module: nn.Module) -> HiddenStreams:
        """Run the pruned ``module``, where there is a pruned stream, and forget what entered it.

        Raises:
            NumericalError: Its output is not finite.
            ArtifactError: The disk is full or cannot be written.
        """
        pruned = None
        if self.pruned is not None:
            copied = copy_layer(module, context.device, context.dtype)
            pruned = HiddenStates.write(
                self.folder / f"pruned-{context.layer.name}",
                (run_layer(copied, window, call) for window, call in context.windows(self.pruned)),
            )
        dense = context.dense
        done = (self.dense, self.pruned, *(dense.inputs if dense else ()))
        for path in {stream.path for stream in done if stream is not None}:
            path.unlink()
        return replace(self, dense=dense.leaving if dense else None, pruned=pruned)


def _output_and_inputs(
    layer: nn.Module, window: Tensor, call: LayerCall, groups: Sequence[OperatorGroup]
) -> list[Tensor]:
    inputs, output = layer_inputs(layer, window, call, groups)
    return [output, *inputs]
