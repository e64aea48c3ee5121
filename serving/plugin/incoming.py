"""The tensors of a packed24 checkpoint, on their way from the files into vLLM's model.

Most packed modules are run by a layer of ours. But vLLM builds some in its own way (whatever it
runs without asking us), loads some in its own way (experts, the input projections of Mamba) and
changes some (LoRA). The weights of those are unpacked before the model sees them, so they are
loaded as those of the dense model are. What was only loaded so is packed again thereafter, by a
layer of ours (linear.py) or where it is faster (experts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from sparseserve.checkpoint import packed24, quantized24
from sparseserve.checkpoint.stacks import ExpertStack
from sparseserve.errors import ArtifactError, ServingError
from sparseserve.serving.plugin.config import SparseServeConfig
from sparseserve.serving.plugin.experts import TwoFourExpertsMethod
from sparseserve.serving.plugin.linear import (
    LoadedDense24LinearMethod,
    Packed24LinearMethod,
    UnnamedLinearMethod,
)
from sparseserve.serving.plugin.norms import use_fused_norms
from sparseserve.serving.plugin.parameters import LEAVES

logger = init_logger("vllm.sparseserve")

Weights = Iterable[tuple[str, Tensor]]
_LEAVES = {**LEAVES, packed24.VERSION_1_VALUES: LEAVES[packed24.VALUES]}
_MADE_BY_VLLM = BaseModelLoader.create_model


def watch_models() -> None:
    """See every model that vLLM makes, before its weights are loaded.

    vLLM has no hook there: a quantization method is asked about each layer, but never told of the
    model, nor of tensors. A second call changes nothing.
    """
    BaseModelLoader.create_model = _create_model


def _create_model(
    loader: BaseModelLoader, vllm_config: Any, *args: Any, **kwargs: Any
) -> nn.Module:
    """Make the model as vLLM does, and take over what is ours in it."""
    model: nn.Module = _MADE_BY_VLLM(loader, vllm_config, *args, **kwargs)
    config = vllm_config.quant_config
    if isinstance(config, SparseServeConfig):
        renamed = _take_renamed(model, config)
        if config.is_packed:
            _take_over(model, config, renamed)
        if use_fused_norms(vllm_config):
            logger.info_once("norms run in one operator each")
    return model


def incoming(
    weights: Weights,
    packed: Iterable[str],
    taken: frozenset[str],
    transposed: frozenset[str],
    quantized_as: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``weights`` under the names of the parameters that they are loaded into.

    Args:
        weights: Tensors of the checkpoint by name.
        packed: Its packed modules.
        taken: Those that a layer of ours runs; the others are unpacked.
        transposed: Those whose dense weight is stored ``[in, out]``.
        quantized_as: The dtype of weights that are quantised; None where they are not.

    Raises:
        ServingError: One of the tensors of a packed module is missing or damaged.
    """
    held: dict[str, dict[str, Tensor]] = {}
    packed = frozenset(packed)
    needed = len(LEAVES) - (quantized_as is None)
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        if module not in packed or leaf not in _LEAVES:
            yield name, tensor
        elif module in taken:
            yield f"{module}.{_LEAVES[leaf]}", tensor
        else:
            parts = held.setdefault(module, {})
            parts[_LEAVES[leaf]] = tensor
            if len(parts) == needed:
                del held[module]
                dense = _dense(module, parts, quantized_as)
                yield f"{module}.weight", dense.T.contiguous() if module in transposed else dense
    for module, parts in held.items():
        there = next(iter(parts))
        raise ServingError(
            f"{module} has {there}, but not what belongs to it: check the folder with "
            "sparseserve verify"
        )


def put_together(weights: Weights, stacks: Iterable[ExpertStack]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``weights``, those of experts in the ``stacks`` that vLLM knows them in.

    Raises:
        ServingError: The weight of an expert is missing.
    """
    stack_of = {f"{module}.weight": stack for stack in stacks for module in stack.modules}
    made: dict[str, Tensor] = {}
    missing: dict[str, set[str]] = {}
    for name, tensor in weights:
        stack = stack_of.get(name)
        if stack is None:
            yield name, tensor
            continue
        whole = stack.tensor
        if whole not in made:
            made[whole] = stack.empty(tensor)
            missing[whole] = {f"{module}.weight" for module in stack.modules}
        module = name.removesuffix(".weight")
        stack.weight(made[whole], *stack.place(module)).copy_(tensor)
        missing[whole].discard(name)
        if not missing[whole]:
            yield whole, made.pop(whole)
            del missing[whole]
    for names in missing.values():
        raise ServingError(f"{min(names)} is missing: check the folder with sparseserve verify")


def _take_renamed(model: nn.Module, config: SparseServeConfig) -> set[str]:
    """Take over layers that vLLM asks for under another name than it loads them by.

    Returns:
        The names of their 2:4 modules, as vLLM loads them.
    """
    taken: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "quant_method", None), UnnamedLinearMethod):
            modules = config.checkpoint_modules(name)
            if names := {module.name for module in modules if module.sparse}:
                layer.quant_method = LoadedDense24LinearMethod(name, modules, config.timed)
                taken |= names
    return taken


def _take_over(model: Any, config: SparseServeConfig, renamed: set[str]) -> None:
    as_packed, as_dense = _names_run_by_us(model)
    as_dense |= renamed
    taken = frozenset(name for name, known in config.packed.items() if known in as_packed)
    experts = _experts_run_by_us(model)
    left = sorted(
        name
        for name, known in config.packed.items()
        if known not in as_packed | as_dense and not str(known).startswith(experts)
    )
    if left:
        logger.info(
            "%d packed modules run dense, because vLLM makes them in its own way; the first is %s",
            len(left),
            left[0],
        )
    load: Callable[..., Any] = model.load_weights

    @wraps(load)
    def load_weights(weights: Weights, *args: Any, **kwargs: Any) -> Any:
        found = incoming(weights, config.packed, taken, config.transposed, config.read_dtype)
        return load(put_together(found, config.stacks), *args, **kwargs)

    model.load_weights = load_weights


def _names_run_by_us(model: nn.Module) -> tuple[set[str], set[str]]:
    """Return vLLM's names of the packed modules in layers of ours.

    Those that are loaded packed, and those that the model loads dense, in a way of its own.
    """
    packed: set[str] = set()
    dense: set[str] = set()
    reordered = _reordered(model)
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, Packed24LinearMethod):
            continue
        names = {module.name for module in method.modules if module.sparse}
        if name in reordered or method.is_loaded_by_the_model(layer):
            method.let_the_model_load(layer)
            dense |= names
        else:
            packed |= names
    return packed, dense


def _experts_run_by_us(model: nn.Module) -> tuple[str, ...]:
    """Return what vLLM's names of experts begin with that are packed once they are loaded."""
    return tuple(
        f"{layer.layer_name}."
        for layer in model.modules()
        if isinstance(getattr(layer, "quant_method", None), TwoFourExpertsMethod)
    )


def _reordered(model: nn.Module) -> frozenset[str]:
    """Return the names of layers whose rows the model reorders as they are read.

    Llama 4 does that to tensors whose names say that they are dense queries or keys.
    """
    return frozenset(
        f"{name}.{part}".lstrip(".")
        for name, module in model.named_modules()
        if hasattr(module, "permute_qk_weight_for_rotary")
        for part, _ in module.named_modules()
        if part.endswith(".qkv_proj")
    )


def _dense(module: str, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    values, indices, *scale = (parts[leaf] for leaf in LEAVES.values() if leaf in parts)
    try:
        if dtype is None:
            return packed24.unpack24(packed24.Packed24(values, indices))
        quantized = quantized24.from_stored(values, indices, scale[0], dtype)
        return packed24.unpack24(quantized.dequantized())
    except ArtifactError as error:
        raise ServingError(f"{module}: {error}") from error
