"""Tensors that hold one projection, or two merged ones, of all experts of a layer.

Experts are pruned, packed and named one by one, as ``OWNER.3.gate_proj``. Many models keep all of
them in one tensor ``[experts, ...]``, in memory or on disk, in one of a few layouts. This module
alone knows those layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseserve.errors import ArtifactError
from sparseserve.paths import shown, shown_value

#: Where the configuration of a packed checkpoint has the layouts.
STACKS_KEY = "stacks"
_KEYS = {"experts", "projections", "interleaved", "transposed"}
# Sizes from outside are checked before memory is taken for them.
_MOST_EXPERTS = 2**16


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The layout of a tensor that holds the weights of all experts.

    Attributes:
        owner: Full name of the module of all experts.
        leaf: Name of the tensor in it, such as ``gate_up_proj``.
        experts: How many there are: the first dimension.
        projections: Names of what each expert has in it: one, or two whose outputs are merged.
        interleaved: Whether the outputs of two alternate; else the second follows the first.
        transposed: Whether a weight lies as ``[in, out]``.
    """

    owner: str
    leaf: str
    experts: int
    projections: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False

    @property
    def tensor(self) -> str:
        """Full name of the tensor."""
        return f"{self.owner}.{self.leaf}"

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the linears in it, expert by expert."""
        return tuple(
            self.module(expert, projection)
            for expert in range(self.experts)
            for projection in self.projections
        )

    def module(self, expert: int, projection: str) -> str:
        """Return the full name of one linear."""
        return f"{self.owner}.{expert}.{projection}"

    def holds(self, module: str) -> bool:
        """Whether a linear lies in it."""
        owner, expert, projection = module.rsplit(".", 2) if module.count(".") > 1 else ("",) * 3
        return (
            owner == self.owner
            and projection in self.projections
            and expert.isdecimal()
            and int(expert) < self.experts
        )

    def place(self, module: str) -> tuple[int, str]:
        """Return the expert and the projection of one of ``modules``."""
        _, expert, projection = module.rsplit(".", 2)
        return int(expert), projection

    def weight(self, stack: Tensor, expert: int, projection: str) -> Tensor:
        """Return a view of one weight ``[out, in]`` in ``stack``."""
        matrix = stack[expert].T if self.transposed else stack[expert]
        return self._rows(matrix, projection)

    def bias(self, stack: Tensor, expert: int, projection: str) -> Tensor:
        """Return a view of one bias ``[out]`` in ``stack``, which holds those of all experts."""
        return self._rows(stack[expert], projection)

    def shape_of_one(self, stack: Tensor) -> tuple[int, int]:
        """Return ``[out, in]`` of one of the weights in ``stack``."""
        rows, columns = self.weight(stack, 0, self.projections[0]).shape
        return rows, columns

    def put_together(self, weights: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Return a new stack of ``weights``, ``[out, in]`` by the names of all ``modules``."""
        whole: Tensor | None = None
        for module, weight in weights:
            if whole is None:
                whole = self.empty(weight)
            self.weight(whole, *self.place(module)).copy_(weight)
        assert whole is not None, "a stack has at least one expert"
        return whole

    def empty(self, one: Tensor) -> Tensor:
        """Return memory for a whole stack of weights like ``one``, ``[out, in]``."""
        rows, columns = one.shape
        rows *= len(self.projections)
        shape = (columns, rows) if self.transposed else (rows, columns)
        return one.new_empty(self.experts, *shape)

    def _rows(self, merged: Tensor, projection: str) -> Tensor:
        number, count = self.projections.index(projection), len(self.projections)
        return merged[number::count] if self.interleaved else merged.chunk(count)[number]


def stacks_from_json(where: Path | str, data: object) -> tuple[ExpertStack, ...]:
    """Read what ``stacks_to_json`` wrote.

    Args:
        where: Names its place, for messages.
        data: JSON data.

    Raises:
        ArtifactError: It is something else; names the tensor.
    """
    if not isinstance(data, Mapping):
        raise ArtifactError(f"{where}: stacks is {shown_value(data)}, but must be an object")
    found = []
    for name, layout in data.items():
        stack = _from_json(str(name), layout)
        if stack is None:
            raise ArtifactError(
                f"{where}: stacks {shown(str(name))} is {shown_value(layout)}, which is no layout "
                "of experts: export it again"
            )
        found.append(stack)
    return tuple(found)


def stacks_to_json(stacks: tuple[ExpertStack, ...]) -> dict[str, dict[str, Any]]:
    """Return the layouts as JSON data, by the names of the tensors."""
    layouts = {stack.tensor: asdict(stack) for stack in stacks}
    for layout in layouts.values():
        del layout["owner"], layout["leaf"]
        layout["projections"] = list(layout["projections"])
    return layouts


def _from_json(name: str, layout: object) -> ExpertStack | None:
    owner, _, leaf = name.rpartition(".")
    if not owner or not isinstance(layout, Mapping) or layout.keys() != _KEYS:
        return None
    experts, projections = layout["experts"], layout["projections"]
    whole = (
        isinstance(experts, int) and not isinstance(experts, bool) and 0 < experts <= _MOST_EXPERTS
    )
    named = (
        isinstance(projections, list)
        and len(projections) in (1, 2)
        and all(isinstance(item, str) and item.isidentifier() for item in projections)
    )
    flags = (layout["interleaved"], layout["transposed"])
    if not whole or not named or not all(isinstance(flag, bool) for flag in flags):
        return None
    return ExpertStack(owner, leaf, experts, tuple(projections), *flags)
