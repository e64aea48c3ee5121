r"""Where attention values may be rotated: found by what a layer does, not by what it is called.

Attention weighs values and sums them, head by head: what leaves a head is linear in its values. A
rotation ``R`` of the values of a head, ``V <- R^T V``, is therefore undone by the operator that
reads the head, ``O <- O R``, and the layer computes what it did. That fails where values pass a
gate, or a norm with gains, on their way. So random rotations are tried: a place counts if the
layer's output stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseserve.models.layer_behaviour import LayerBehaviour, layer_behaviours
from sparseserve.models.layers import layer_weight
from sparseserve.models.structure import LayerStructure, ModelStructure, Operator

# Head widths that models have, the largest first: a part of a head could be rotated, too.
_WIDTHS = (512, 256, 192, 160, 128, 112, 96, 80, 64, 48, 40, 32, 24, 16, 8)


@dataclass(frozen=True, slots=True)
class ValueHeads:
    """Values of a layer's attention, head by head, and what reads them.

    Attributes:
        values: The operator that makes them, maybe among other rows.
        start: Its first row that does.
        rows: How many do; heads follow each other.
        outputs: The operator that reads the heads. Its inputs are ``width`` columns for each query
            head, and query heads that share values follow each other.
        width: Of a head.
    """

    values: Operator
    start: int
    rows: int
    outputs: Operator
    width: int

    @property
    def heads(self) -> int:
        """How many heads of values there are."""
        return self.rows // self.width

    @property
    def shared_by(self) -> int:
        """How many query heads read the values of one head."""
        return self.outputs.in_features // self.rows

    @torch.no_grad()
    def rotate(self, layer: nn.Module, rotations: Tensor) -> None:
        """Turn the values of ``layer`` and what reads them, in place.

        Args:
            layer: The decoder layer, in any dtype.
            rotations: Orthogonal, ``[heads, width, width]``.
        """
        self.rotate_values(layer, rotations)
        self.rotate_outputs(layer, rotations)

    @torch.no_grad()
    def rotate_outputs(self, layer: nn.Module, rotations: Tensor) -> None:
        """Turn what reads the values alone, in place."""
        outputs = layer_weight(layer, self.outputs)
        outputs.copy_(self.rotate_inputs(outputs.to(rotations.dtype), rotations))

    def rotate_inputs(self, inputs: Tensor, rotations: Tensor) -> Tensor:
        """Return rows ``[n, in_features]`` that ``outputs`` reads, as they are after rotation."""
        shape = (len(inputs), self.heads, self.shared_by, self.width)
        turned = torch.einsum("nkrh,khg->nkrg", inputs.reshape(shape), rotations)
        return turned.reshape(inputs.shape)

    @torch.no_grad()
    def rotate_values(self, layer: nn.Module, rotations: Tensor) -> None:
        """Turn the values alone, in place: the layer then computes something else."""
        stop = self.start + self.rows
        rows = [layer_weight(layer, self.values)[self.start : stop]]
        bias = getattr(layer.get_submodule(self.values.name), "bias", None)
        if bias is not None:
            rows.append(bias.detach()[self.start : stop, None])
        for part in rows:
            heads = part.to(rotations.dtype).reshape(self.heads, self.width, -1)
            part.copy_((rotations.mT @ heads).reshape(part.shape))


def find_value_heads(
    model: nn.Module, structure: ModelStructure, window: Tensor
) -> tuple[tuple[ValueHeads, ...], ...]:
    """Return, for each decoder layer, where its values may be rotated.

    Args:
        model: A causal language model in evaluation mode, on the CPU; not changed.
        structure: Its layers.
        window: Token ids ``[T]``; a few show it.
    """
    behaviours = layer_behaviours(model, structure, window)
    # Each layer is tried: two of one class may treat their values in different ways.
    return tuple(
        tuple(_found(behaviour, layer))
        for behaviour, layer in zip(behaviours, structure.layers, strict=True)
    )


def _found(behaviour: LayerBehaviour, layer: LayerStructure) -> Iterator[ValueHeads]:
    """Try all pairs of operators that could be values and what reads them."""
    read: set[str] = set()
    groups = layer.common_groups
    for number, group in enumerate(groups):
        for outputs in group.operators:
            for values in (value for group in groups[:number] for value in group.operators):
                if values.name in read:
                    continue
                heads = _heads(behaviour, values, outputs)
                if heads is not None:
                    read |= {values.name, outputs.name}
                    yield heads
                    break


def _heads(behaviour: LayerBehaviour, values: Operator, outputs: Operator) -> ValueHeads | None:
    for start, rows in _candidate_rows(values, outputs):
        # Turned by half a turn, whatever is linear in the values stays: most pairs end here.
        half = ValueHeads(values, start, rows, outputs, rows)
        if not _stays(behaviour, half, -torch.eye(rows)[None]):
            continue
        for width in (width for width in _WIDTHS if rows % width == 0):
            heads = ValueHeads(values, start, rows, outputs, width)
            if _stays(behaviour, heads, _random_rotations(heads.heads, width)):
                return heads
    return None


def _stays(behaviour: LayerBehaviour, heads: ValueHeads, rotations: Tensor) -> bool:
    return behaviour.undone(
        lambda layer: heads.rotate_values(layer, rotations),
        lambda layer: heads.rotate_outputs(layer, rotations),
        {heads.values.name, heads.outputs.name},
    )


def _candidate_rows(values: Operator, outputs: Operator) -> Sequence[tuple[int, int]]:
    """Return the rows, first and number, that may be values: all, or the last of q, k and v."""
    rows, inputs = values.out_features, outputs.in_features
    fused = (rows - inputs) // 2
    candidates = []
    if inputs % rows == 0:
        candidates.append((0, rows))
    if fused > 0 and (rows - inputs) % 2 == 0 and inputs % fused == 0:
        candidates.append((rows - fused, fused))
    return candidates


def _random_rotations(heads: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    rotations: Tensor = torch.linalg.qr(torch.randn(heads, width, width, generator=generator)).Q
    return rotations
