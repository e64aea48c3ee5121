"""The fallback: unpack once, then run what vLLM runs for an ordinary weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sparseserve.serving.kernels.protocol import LinearSpec, LoadedWeight


class DenseKernel:
    """vLLM's own dense product, with zeros in place: oneDNN on a CPU, cuBLAS on a GPU."""

    def __init__(self) -> None:
        """Let vLLM choose its product, which it does from the configuration of the moment."""
        self._dense = UnquantizedLinearMethod()

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Run everything."""
        return None

    def pack(self, layer: nn.Module, weight: LoadedWeight) -> None:
        """Register ``weight``; on a CPU vLLM then moves it into oneDNN's own layout."""
        layer.register_parameter("weight", Parameter(weight.dense(), requires_grad=False))
        self._dense.process_weights_after_loading(layer)

    def matmul(self, layer: nn.Module, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Return the dense product."""
        product: Tensor = self._dense.apply(layer, inputs, bias)
        return product
