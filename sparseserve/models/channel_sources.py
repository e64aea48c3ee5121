r"""Where the channels that operators read may be scaled: found by what a layer does.

If what makes a channel is divided by a factor, and every operator that reads the channel multiplies
its column by it, the layer computes what it did. A norm with a gain for each channel can be divided
so, and so can an operator whose rows reach the next one through a product or a ReLU. Factors are
tried on the layer: a place counts if the output stays (``layer_behaviour.py``). It stays only where
nothing else reads the channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparseserve.models.layer_behaviour import LayerBehaviour, layer_behaviours
from sparseserve.models.layers import layer_weight
from sparseserve.models.structure import LayerStructure, ModelStructure, Operator, OperatorGroup


@dataclass(frozen=True, slots=True)
class ChannelSource:
    """What makes the channels that a group of operators reads.

    Attributes:
        group: All that read them.
        module: The name in the layer of what makes them.
        operator: The same, if it is an operator; None for a norm.
        start: Its first row that makes one.
        offset: What the norm adds to its gain: Gemma multiplies by one plus the stored value.
    """

    group: OperatorGroup
    module: str
    operator: Operator | None = None
    start: int = 0
    offset: float = 0.0

    @property
    def operators(self) -> set[Operator]:
        """All operators that scaling changes."""
        return {*self.group.operators, *([self.operator] if self.operator else [])}

    @property
    def modules(self) -> set[str]:
        """The names of all modules that scaling changes."""
        return {self.module, *(operator.name for operator in self.group.operators)}

    def scale(self, layer: nn.Module, factors: Tensor, stored: torch.dtype = torch.float32) -> None:
        """Divide the channels by ``factors`` ``[in_features]`` where they are made, and undo it.

        Args:
            layer: The decoder layer; changed in place.
            factors: Positive.
            stored: What gains are rounded to in the end. The columns are multiplied by what the
                rounded gains really divide by.
        """
        self.multiply(layer, self.divide(layer, factors, stored))

    @torch.no_grad()
    def divide(
        self, layer: nn.Module, factors: Tensor, stored: torch.dtype = torch.float32
    ) -> Tensor:
        """Divide the channels, in place, and return by what: the layer computes something else."""
        rows = slice(self.start, self.start + self.group.in_features)
        vectors = dict(layer.get_submodule(self.module).named_parameters(recurse=False))
        weight = vectors.pop("weight")
        if self.operator is not None:
            layer_weight(layer, self.operator)[rows].div_(factors[:, None])
        else:
            gains = weight.double() + self.offset
            weight.copy_((gains / factors - self.offset).to(stored))
            found = gains / (weight.double() + self.offset)
            factors = found.where(torch.isfinite(found) & (found > 0), factors.double()).float()
        for vector in vectors.values():
            vector[rows] = vector[rows] / factors
        return factors

    @torch.no_grad()
    def multiply(self, layer: nn.Module, factors: Tensor) -> None:
        """Multiply the columns of what reads the channels alone, in place."""
        for operator in self.group.operators:
            layer_weight(layer, operator).mul_(factors)


def find_channel_sources(
    model: nn.Module, structure: ModelStructure, window: Tensor
) -> tuple[tuple[ChannelSource, ...], ...]:
    """Return, for each decoder layer, where channels may be scaled, at most once a group.

    Args:
        model: A causal language model in evaluation mode, on the CPU; not changed.
        structure: Its layers.
        window: Token ids ``[T]``; a few show it.
    """
    modules = [model.get_submodule(layer.name) for layer in structure.layers]
    owners = Counter(id(vector) for module in modules for vector in module.parameters())
    found = []
    behaviours = layer_behaviours(model, structure, window)
    for layer, module, behaviour in zip(structure.layers, modules, behaviours, strict=True):
        # What several layers share would be scaled for all of them.
        shared = {name for name, vector in module.named_parameters() if owners[id(vector)] > 1}
        candidates = [
            source
            for source in _candidates(layer, module)
            if not any(name.rpartition(".")[0] in source.modules for name in shared)
        ]
        found.append(tuple(_found(behaviour, candidates)))
    return tuple(found)


def _found(behaviour: LayerBehaviour, candidates: list[ChannelSource]) -> Iterator[ChannelSource]:
    done: set[OperatorGroup] = set()
    for source in candidates:
        if source.group in done:
            continue
        factors = _trial_factors(source.group.in_features)
        divide = partial(source.divide, factors=factors)
        multiply = partial(source.multiply, factors=factors)
        if behaviour.undone(divide, multiply, source.modules):
            done.add(source.group)
            yield source


def _candidates(layer: LayerStructure, module: nn.Module) -> Iterator[ChannelSource]:
    """Yield what could make the channels of each group by its size: norms, then operators."""
    norms = [name for name, part in module.named_modules() if _is_vector_module(part)]
    groups = layer.common_groups
    for number, group in enumerate(groups):
        width = group.in_features
        for name in norms:
            if module.get_parameter(f"{name}.weight").numel() == width:
                yield ChannelSource(group, name)
                yield ChannelSource(group, name, offset=1.0)
        for operator in (each for earlier in groups[:number] for each in earlier.operators):
            # Gate and up may be one operator.
            starts = {width: [0], 2 * width: [width, 0]}.get(operator.out_features, [])
            for start in starts:
                yield ChannelSource(group, operator.name, operator, start)


def _is_vector_module(module: nn.Module) -> bool:
    """Whether its own parameters are a weight and others of the same size, all of them vectors."""
    own = dict(module.named_parameters(recurse=False))
    sizes = {vector.shape for vector in own.values()}
    return "weight" in own and len(sizes) == 1 and own["weight"].dim() == 1


def _trial_factors(channels: int) -> Tensor:
    """Return powers of two, which no rounding hides; neighbours differ."""
    generator = torch.Generator().manual_seed(channels)
    return torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float())
