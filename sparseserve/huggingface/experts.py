"""Mixtures of experts as linear operators: each expert's projections as modules of their own.

transformers keeps the experts of a layer in one or two tensors ``[experts, ...]``. Here a module
takes their place in which every projection of every expert is an ``nn.Linear`` whose weight is a
view of those tensors, so what is written into one is written into the model. It computes what
transformers does, expert by expert, and hands each linear the rows that the router sent to it.

Works for all experts that transformers runs through ``ExpertsInterface``
(``transformers.integrations.moe``): it says how their tensors are laid out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseserve.checkpoint.stacks import ExpertStack

_UP, _GATE_UP, _DOWN = "up_proj", "gate_up_proj", "down_proj"
#: What one layer's experts were told: the experts of each token, and their weights. Of experts that
#: are handed all tokens, what their router returns.
Routing = tuple[Tensor, ...]


class ExpertLinears(nn.Module):
    """The experts of a layer; the children ``0``, ``1``, ... hold their linears."""

    def __init__(self, experts: nn.Module) -> None:
        """Take the place of ``experts``, whose memory is shared."""
        super().__init__()
        # What is left of the module without its tensors: the activation, and how gates are applied.
        rest = copy.copy(experts)
        rest._parameters = {}
        self._rest: Any = rest
        self.stacks = expert_stacks("", experts)
        for expert in range(self.stacks[0].experts):
            linears = nn.Module()
            for stack in self.stacks:
                for projection in stack.projections:
                    linears.add_module(projection, _linear(experts, stack, expert, projection))
            self.add_module(str(expert), linears)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighed sum of what the experts of each token make of it.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: Which experts, ``[tokens, k]``; one out of range stands for none.
            top_k_weights: Their weights, likewise.
        """
        total = torch.zeros_like(hidden_states)
        for expert in range(len(self)):
            tokens, places = torch.where(top_k_index == expert)
            if len(tokens):
                found = self._run(expert, hidden_states[tokens])
                found = found * top_k_weights[tokens, places, None]
                total.index_add_(0, tokens, found.to(total.dtype))
        return total

    def __len__(self) -> int:
        """Return the number of experts."""
        return self.stacks[0].experts

    def linears_by_input(self) -> Iterator[tuple[str, ...]]:
        """Yield the names of linears that read one input, in an order in which data reaches them.

        No expert waits for another, so all that read hidden states come before what follows.
        """
        for stack in self.stacks:
            for expert in range(len(self)):
                yield tuple(f"{expert}.{projection}" for projection in stack.projections)

    def write_back(self, experts: nn.Module) -> None:
        """Write what has got memory of its own meanwhile into the tensors of ``experts``.

        A linear shares their memory until something, such as another dtype, gives it a new weight.
        """
        own = {name: vector.detach() for name, vector in experts.named_parameters(recurse=False)}
        for stack in self.stacks:
            biases = own.get(f"{stack.leaf}_bias")
            for expert in range(stack.experts):
                for projection in stack.projections:
                    linear = self.get_submodule(f"{expert}.{projection}")
                    _keep(stack.weight(own[stack.leaf], expert, projection), linear, "weight")
                    if biases is not None:
                        _keep(stack.bias(biases, expert, projection), linear, "bias")

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        linears = self.get_submodule(str(expert))
        stack = self.stacks[0]
        made = [linears.get_submodule(name)(rows) for name in stack.projections]
        found: Tensor = linears.get_submodule(_DOWN)(self._activated(made))
        return found

    def _activated(self, made: Sequence[Tensor]) -> object:
        if len(made) == 1:
            return self._rest.act_fn(made[0])
        if self.stacks[0].interleaved:
            return self._rest._apply_gate(torch.stack(tuple(made), dim=-1).flatten(-2))
        return self._rest._apply_gate(torch.cat(tuple(made), dim=-1))


class SpreadExpertLinears(ExpertLinears):
    """Experts that are handed all tokens, those of others as zeros, and weigh nothing: Llama 4."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # its own call
        """Return what each expert makes of its tokens.

        Args:
            hidden_states: ``[experts * tokens, hidden]``, expert by expert.

        Returns:
            Likewise; zeros where there were zeros.
        """
        by_expert = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        found = torch.zeros_like(by_expert)
        for expert, rows in enumerate(by_expert):
            seen = rows.any(dim=-1).nonzero()[:, 0]
            if len(seen):
                found[expert] = found[expert].index_copy(0, seen, self._run(expert, rows[seen]))
        return found.view_as(hidden_states)

    def _activated(self, made: Sequence[Tensor]) -> object:
        gate, up = made
        return up * self._rest.act_fn(gate)


def expert_stacks(name: str, experts: nn.Module) -> tuple[ExpertStack, ...]:
    """Return how transformers lays out the tensors of ``experts``; of no experts, nothing.

    Args:
        name: Full name of the module.
        experts: Any module.
    """
    parameters = dict(experts.named_parameters(recurse=False))
    leaf = _GATE_UP if _GATE_UP in parameters else _UP
    if leaf not in parameters or _DOWN not in parameters:
        return ()
    # What transformers' decorator of expert classes says; only the last has none.
    flags = [getattr(experts, flag, None) for flag in ("is_transposed", "is_concatenated")]
    transposed, concatenated = (True, True) if _is_spread(experts) else flags
    if transposed is None:
        return ()
    count = len(parameters[leaf])
    names = ("gate_proj", _UP) if leaf == _GATE_UP else (_UP,)
    merged = len(names) > 1 and not concatenated
    return (
        ExpertStack(name, leaf, count, names, interleaved=merged, transposed=transposed),
        ExpertStack(name, _DOWN, count, (_DOWN,), transposed=transposed),
    )


@contextmanager
def unstacked_experts(model: nn.Module) -> Iterator[None]:
    """Let every expert of ``model`` be linears in the block; afterwards the model is as it was.

    What is written into a linear stays, also where it was given a new weight.
    """
    stacked = {
        name: module for name, module in model.named_modules() if expert_stacks(name, module)
    }
    with ExitStack() as restore:
        for name, experts in stacked.items():
            kind = SpreadExpertLinears if _is_spread(experts) else ExpertLinears
            linears = kind(experts)
            model.set_submodule(name, linears)
            restore.callback(model.set_submodule, name, experts)
            restore.callback(linears.write_back, experts)
        yield


def experts_in(layer: nn.Module) -> dict[str, ExpertLinears]:
    """Return the unstacked experts in ``layer`` by name."""
    return {
        name: module for name, module in layer.named_modules() if isinstance(module, ExpertLinears)
    }


def routers_in(layer: nn.Module) -> frozenset[str]:
    """Return the names of the modules in ``layer`` that send tokens to experts.

    They stand beside the unstacked experts and hold a matrix with one row for each expert.
    """
    found: set[str] = set()
    for owner, experts in experts_in(layer).items():
        block = owner.rpartition(".")[0]
        for name, module in layer.get_submodule(block).named_modules():
            full_name = f"{block}.{name}".strip(".")
            matrices = (p for p in module.parameters(recurse=False) if p.ndim > 1)
            inside = full_name == owner or full_name.startswith(f"{owner}.")
            if not inside and any(len(matrix) == len(experts) for matrix in matrices):
                found.add(full_name)
    return frozenset(found)


@contextmanager
def recorded_routing(layer: nn.Module) -> Iterator[dict[str, Routing]]:
    """Give a mapping that is filled with the routing of the runs of ``layer`` in the block."""
    found: dict[str, Routing] = {}
    with ExitStack() as stack:
        for name, experts in experts_in(layer).items():

            def record(
                _: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Tensor],
                name: str = name,
            ) -> None:
                found[name] = _routing(args, kwargs)

            def record_output(
                _: nn.Module, args: object, output: tuple[Tensor, ...], name: str = name
            ) -> None:
                found[name] = output

            if isinstance(experts, SpreadExpertLinears):
                handle = _router(layer, name).register_forward_hook(record_output)
            else:
                handle = experts.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        yield found


@contextmanager
def replayed_routing(layer: nn.Module, routing: dict[str, Routing]) -> Iterator[None]:
    """Send each token to the experts of ``routing``, whatever the router says, in the block.

    So the dense and the pruned layer can be compared token by token.
    """
    with ExitStack() as stack:
        for name, experts in experts_in(layer).items():

            def replace(
                _: nn.Module,
                args: Sequence[Tensor],
                kwargs: dict[str, Tensor],
                chosen: Routing = routing[name],
            ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden, *chosen), {}

            def replace_output(
                _: nn.Module, args: object, output: object, chosen: Routing = routing[name]
            ) -> Routing:
                return chosen

            if isinstance(experts, SpreadExpertLinears):
                handle = _router(layer, name).register_forward_hook(replace_output)
            else:
                handle = experts.register_forward_pre_hook(replace, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _is_spread(experts: nn.Module) -> bool:
    return type(experts).__name__ == "Llama4TextExperts"


def _router(layer: nn.Module, experts: str) -> nn.Module:
    block = experts.rpartition(".")[0]
    name = next(name for name in routers_in(layer) if name.rpartition(".")[0] == block)
    return layer.get_submodule(name)


def _routing(args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> Routing:
    named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
    named |= kwargs
    return named["top_k_index"], named["top_k_weights"]


def _keep(place: Tensor, linear: nn.Module, name: str) -> None:
    value = linear.get_parameter(name).detach()
    if value.data_ptr() != place.data_ptr():
        place.copy_(value)


def _linear(experts: nn.Module, stack: ExpertStack, expert: int, projection: str) -> nn.Linear:
    weights = experts.get_parameter(stack.leaf).detach()
    weight = stack.weight(weights, expert, projection)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    biases = dict(experts.named_parameters(recurse=False)).get(f"{stack.leaf}_bias")
    if biases is not None:
        linear.bias = nn.Parameter(
            stack.bias(biases.detach(), expert, projection), requires_grad=False
        )
    return linear
