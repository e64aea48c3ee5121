"""Weights that cannot be pruned as linear operators, told from the modules alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.layer_list import is_linear, linear_modules

_Layers = Sequence[tuple[str, nn.Module]]

# A router or the decay rates of a state-space layer may stay dense, the bulk of a model may not.
_DENSE_SHARE = 0.5

# Convolutions and embeddings inside a layer stay dense, as they do outside.
_KNOWN_HOLDERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def refuse_odd_weights(layers: _Layers) -> None:
    """Refuse linears whose weights are not plain numbers.

    Raises:
        UnsupportedModelError: A linear weight is quantised or computed.
    """
    for layer_name, layer in layers:
        for name, module in linear_modules(layer):
            _refuse_odd_weight(layer_name, name, module)


def shared_weights(model: nn.Module, layers: _Layers) -> dict[str, dict[str, str]]:
    """Find linears whose weight is used by any other module of the model.

    Pruning one would also change, for instance, another layer or the embeddings.

    Returns:
        For each layer that has some, by the name of the linear, why it stays dense.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    found: dict[str, dict[str, str]] = {}
    for layer_name, layer in layers:
        for name, module in linear_modules(layer):
            weight = module.get_parameter("weight")
            full_name = f"{layer_name}.{name}.weight"
            others = [other for other in owners[weight.data_ptr()] if other != full_name]
            if others:
                reason = f"shares its weight with {_kind(model, others[0])}"
                found.setdefault(layer_name, {})[name] = reason
    return found


def loose_matrices(layer: nn.Module) -> dict[str, str]:
    """Find the matrices of ``layer`` that are no weights of linears, and say that of each."""
    return {
        f"{owner_name}.{name}".strip(".").removesuffix(".weight"): "is no linear"
        for owner_name, owner in layer.named_modules()
        if not is_linear(owner) and not isinstance(owner, _KNOWN_HOLDERS)
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.squeeze().ndim >= 2
    }


def refuse_mostly_dense(layers: _Layers, pruned: Mapping[str, int]) -> None:
    """Refuse a model most of whose layers would stay dense: it would only seem to be pruned.

    Args:
        layers: The decoder layers.
        pruned: Numbers of weights of the operators, by full name.

    Raises:
        UnsupportedModelError: Names the largest matrix that would stay dense.
    """
    matrices = {
        f"{layer_name}.{name}".removesuffix(".weight"): parameter
        for layer_name, layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.squeeze().ndim >= 2
    }
    share = 1 - sum(pruned.values()) / sum(matrix.numel() for matrix in matrices.values())
    if share <= _DENSE_SHARE:
        return
    dense = {name: matrix for name, matrix in matrices.items() if name not in pruned}
    largest = max(dense, key=lambda name: dense[name].numel())
    raise UnsupportedModelError(
        f"{share:.0%} of the decoder layers' weights would stay dense, such as {largest} "
        f"{list(dense[largest].shape)}; at most {_DENSE_SHARE:.0%} may. Only linears that see "
        "every token once can be pruned, and experts that transformers runs through its "
        "ExpertsInterface"
    )


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


def _kind(model: nn.Module, parameter_name: str) -> str:
    owner = parameter_name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return f"the embedding {owner}"
    return parameter_name
