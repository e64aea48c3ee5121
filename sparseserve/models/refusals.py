"""Weights that must not be pruned as linear operators, told from the modules alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.layer_list import is_linear, linear_modules

_Layers = Sequence[tuple[str, nn.Module]]


def refuse_foreign_weights(layers: _Layers) -> None:
    """Refuse layers whose matrices are not all plain weights of linear operators.

    Raises:
        UnsupportedModelError: A linear weight is quantised or computed, or a matrix as large as
            an operator lies outside any linear operator (stacked experts, for one), so that
            pruning would silently pass it by.
    """
    for layer_name, layer in layers:
        linears = list(linear_modules(layer))
        for name, module in linears:
            _refuse_odd_weight(layer_name, name, module)
        loose = list(_loose_matrices(layer))
        for name, matrices in loose:
            if matrices.ndim >= 3:
                raise UnsupportedModelError(
                    f"{layer_name}: {name} {list(matrices.shape)} stacks the matrices of "
                    f"{len(matrices)} experts or heads; mixtures of experts are not supported"
                )
        # A router or a small mixing matrix may stay dense; the bulk of a layer may not.
        smallest = min((module.get_parameter("weight").numel() for _, module in linears), default=0)
        for name, matrix in loose:
            if matrix.numel() >= smallest:
                raise UnsupportedModelError(
                    f"{layer_name}: {name} {list(matrix.shape)} is a matrix outside any linear "
                    "operator (nn.Linear or Conv1D) and would be left dense"
                )


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


def _loose_matrices(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for owner_name, owner in layer.named_modules():
        if is_linear(owner) or isinstance(owner, _KNOWN_HOLDERS):
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                yield f"{owner_name}.{name}".lstrip("."), parameter


def _kind(model: nn.Module, parameter_name: str) -> str:
    owner = parameter_name.rpartition(".")[0]
    if isinstance(model.get_submodule(owner), nn.Embedding):
        return f"the embedding {owner}"
    return parameter_name
