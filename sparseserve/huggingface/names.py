"""Names of weights on disk, which are not always those that a model has in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from sparseserve.checkpoint.stacks import ExpertStack
from sparseserve.huggingface.experts import expert_stacks

if TYPE_CHECKING:
    # The quantizer needs this module before transformers has imported its models.
    from transformers import PreTrainedModel

_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class StoredModule:
    """Where a checkpoint keeps the weight of a linear.

    Attributes:
        name: Its name on disk, without ``.weight``.
        stack: The tensor that holds it with those of other experts; None if it has its own.
    """

    name: str
    stack: ExpertStack | None = None


def stored_modules(model: PreTrainedModel, modules: Sequence[str]) -> dict[str, StoredModule]:
    """Return where a checkpoint of ``model`` keeps the weights of ``modules``.

    Most families store a weight under the module's own name. Others, such as Gemma 3 with its
    vision tower, have names on disk that transformers changes while it reads.

    Args:
        model: As transformers builds it.
        modules: Names of linears, those of experts as in ``unstacked_experts``.

    Returns:
        By the name in memory. A module is left out if its weight is stored in another form, such
        as merged with others.
    """
    experts = _stored_experts(model)
    found = {}
    for module in modules:
        if module in experts:
            stored = experts[module]
        else:
            name = stored_name(model, module)
            stored = StoredModule(name) if name else None
        if stored is not None:
            found[module] = stored
    return found


def stored_name(model: PreTrainedModel, module: str) -> str | None:
    """Return the name under which a checkpoint of ``model`` stores the weight of one linear.

    Returns:
        The name without ``.weight``; None where the weight is stored in another form.
    """
    row = model.get_parameter(f"{module}{_SUFFIX}")[:1]
    found = revert_weight_conversion(model, {f"{module}{_SUFFIX}": row})
    name, tensor = next(iter(found.items()))
    # A sketch of a model has no values to compare, but then nothing was computed either.
    unchanged = tensor.shape == row.shape and (row.is_meta or tensor.equal(row))
    same = len(found) == 1 and name.endswith(_SUFFIX) and unchanged
    return name.removesuffix(_SUFFIX) if same else None


@dataclass(frozen=True, slots=True)
class StackPlace:
    """A stack of experts that a model has in one tensor, and its files, too.

    Attributes:
        stack: In the model.
        projections: Names of the projections on disk, in the order of the stack's.
        modules: Names on disk of its experts' linears, each with a weight of its own.
    """

    stack: ExpertStack
    projections: tuple[str, ...]
    modules: tuple[str, ...]


def stacks_on_disk(model: PreTrainedModel) -> tuple[StackPlace, ...]:
    """Return one of each kind of stack that a dense checkpoint of ``model`` keeps whole."""
    found: dict[tuple[str, ...], StackPlace] = {}
    experts = _stored_experts(model)
    for name, module in model.named_modules():
        for stack in expert_stacks(name, module):
            places = [experts[one] for one in stack.modules]
            stored = [place.name for place in places if place and place.stack]
            if len(stored) == len(places):
                first = stored[: len(stack.projections)]
                projections = tuple(item.rpartition(".")[2] for item in first)
                kind = (stack.leaf, *projections, *(item.rsplit(".", 3)[1] for item in first))
                found.setdefault(kind, StackPlace(stack, projections, tuple(stored)))
    return tuple(found.values())


def _stored_experts(model: PreTrainedModel) -> dict[str, StoredModule | None]:
    """Return where the weight of each expert is kept, by its name in memory."""
    found: dict[str, StoredModule | None] = {}
    for name, module in model.named_modules():
        for stack in expert_stacks(name, module):
            shape = stack.shape_of_one(module.get_parameter(stack.leaf))
            marks = _marks(stack, stack.modules, stack.modules, shape)
            places = dict(_places(stack, shape, revert_weight_conversion(model, marks)))
            found |= {module: places.get(module) for module in stack.modules}
    return found


def _places(
    stack: ExpertStack, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, StoredModule]]:
    """Tell from the marks in the ``tensors`` on disk what each of them holds of ``stack``."""
    for name, tensor in tensors.items():
        if tensor.ndim == len(shape) and name.endswith(_SUFFIX):
            if tuple(tensor.shape) == shape and bool((tensor == tensor[0, 0]).all()):
                yield stack.modules[int(tensor[0, 0])], StoredModule(name.removesuffix(_SUFFIX))
        elif (on_disk := _layout(stack, shape, name, tensor)) is not None:
            for expert, projection in product(range(stack.experts), on_disk.projections):
                own = on_disk.module(expert, projection)
                yield stack.module(expert, projection), StoredModule(own, on_disk)


def _layout(
    stack: ExpertStack, shape: tuple[int, int], name: str, tensor: Tensor
) -> ExpertStack | None:
    """Return how ``tensor`` on disk holds all or one of the projections of ``stack``."""
    owner, _, leaf = name.rpartition(".")
    several = {stack.projections, *((projection,) for projection in stack.projections)}
    # Of two layouts that look alike, the one that the model itself has.
    turned = (stack.transposed, not stack.transposed)
    for projections, transposed, interleaved in product(several, turned, (False, True)):
        tried = replace(
            stack,
            owner=owner,
            leaf=leaf,
            projections=projections,
            transposed=transposed,
            interleaved=interleaved and len(projections) > 1,
        )
        modules = [stack.module(*tried.place(module)) for module in tried.modules]
        [expected] = _marks(tried, modules, stack.modules, shape).values()
        if expected.shape == tensor.shape and expected.equal(tensor):
            return tried
    return None


def _marks(
    stack: ExpertStack, modules: Sequence[str], numbered: Sequence[str], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Return a stack of weights of ``shape``, each filled with the number of its module.

    Args:
        stack: The layout.
        modules: Which module each of the stack's is.
        numbered: All modules, in the order of their numbers.
        shape: ``[out, in]`` of one weight. No memory is taken for its columns.
    """
    numbers = {module: number for number, module in enumerate(numbered)}
    rows, columns = shape
    one = stack.empty(torch.empty(rows, 1, dtype=torch.int32, device="cpu"))
    for own, module in zip(stack.modules, modules, strict=True):
        stack.weight(one, *stack.place(own)).fill_(numbers[module])
    wide = [-1, columns, -1] if stack.transposed else [-1, -1, columns]
    return {stack.tensor: one.expand(wide)}
