"""How the 2:4 layers of a loaded model are run, for those who report it."""

from __future__ import annotations

from torch import nn

from sparseserve.serving.kernels import LayerKernels
from sparseserve.serving.plugin.experts import TwoFourExpertsMethod
from sparseserve.serving.plugin.linear import TwoFourLinearMethod


def chosen_kernels(model: nn.Module) -> dict[str, LayerKernels]:
    """Return the kernels of each 2:4 layer, by vLLM's name of the layer.

    Those of experts are two, ``w13`` (gates and the linears beside them) and ``w2``.
    """
    found: dict[str, LayerKernels] = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, TwoFourLinearMethod) and method.kernels:
            found[name] = method.kernels
        elif isinstance(method, TwoFourExpertsMethod):
            found |= {f"{name}.{part}": kernels for part, kernels in method.kernels.items()}
    return found
