"""Weights that must not be pruned as linear operators, told from the modules alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.layer_list import is_linear, linear_modules

_Layers = Sequence[tuple[str, nn.Module]]


def refuse_foreign_weights(layers: _Layers) -> None:
    """Refuse layers whose matrices are not all plain weights of linear operators.

    Raises:
        UnsupportedModelError: A linear weight is quantised or computed, experts are stacked in one
            tensor, or much of the layer lies outside linear operators, so that pruning would
            silently pass it by.
    """
    for layer_name, layer in layers:
        linears = list(linear_modules(layer))
        for name, module in linears:
            _refuse_odd_weight(layer_name, name, module)
        _refuse_loose_matrices(layer_name, layer, [module for _, module in linears])


def refuse_shared_weights(model: nn.Module, layers: _Layers) -> None:
    """Refuse operators whose weight is used by any other module of the model.

    Raises:
        UnsupportedModelError: Pruning the operator would also change, for instance, another
            layer or the embeddings.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for layer_name, layer in layers:
        for name, module in linear_modules(layer):
            weight = module.get_parameter("weight")
            full_name = f"{layer_name}.{name}.weight"
            others = [other for other in owners[weight.data_ptr()] if other != full_name]
            if others:
                raise UnsupportedModelError(
                    f"{layer_name}: {name} shares its weight with {_kind(model, others[0])}; "
                    "tied operators are not supported"
                )


# A router or the decay rates of a state-space layer may stay dense, the bulk of a layer may not.
_LOOSE_SHARE = 0.1

# Convolutions and embeddings inside a layer stay dense, as they do outside.
_KNOWN_HOLDERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def _refuse_odd_weight(layer: str, name: str, module: nn.Module) -> None:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise UnsupportedModelError(
            f"{layer}: {name} ({type(module).__name__}) has no plain weight parameter; "
            "prune the model before wrapping or parametrising its operators"
        )
    if not weight.is_floating_point() or weight.element_size() < 2 or weight.ndim != 2:
        raise UnsupportedModelError(
            f"{layer}: the weight of {name} is {tuple(weight.shape)} of {weight.dtype}; "
            "quantised models cannot be pruned, use the dense original"
        )


def _refuse_loose_matrices(layer_name: str, layer: nn.Module, linears: list[nn.Module]) -> None:
    loose = {
        f"{owner_name}.{name}".lstrip("."): parameter
        for owner_name, owner in layer.named_modules()
        if not is_linear(owner) and not isinstance(owner, _KNOWN_HOLDERS)
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.squeeze().ndim >= 2
    }
    for name, stack in loose.items():
        if stack.squeeze().ndim >= 3:
            raise UnsupportedModelError(
                f"{layer_name}: {name} {list(stack.shape)} stacks the matrices of {len(stack)} "
                "experts or heads, which transformers does not run through its ExpertsInterface; "
                "they cannot be pruned one by one"
            )
    outside = sum(matrix.numel() for matrix in loose.values())
    inside = sum(module.get_parameter("weight").numel() for module in linears)
    if outside > _LOOSE_SHARE * (outside + inside):
        largest = max(loose, key=lambda name: loose[name].numel())
        raise UnsupportedModelError(
            f"{layer_name}: {outside / (outside + inside):.0%} of its weights, such as {largest} "
            f"{list(loose[largest].shape)}, lie outside linear operators (nn.Linear or Conv1D) "
            f"and would stay dense; at most {_LOOSE_SHARE:.0%} may"
        )


def _kind(model: nn.Module, parameter_name: str) -> str:
    owner = parameter_name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return f"the embedding {owner}"
    return parameter_name
