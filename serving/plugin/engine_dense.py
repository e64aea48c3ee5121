"""vLLM's own dense product as a kernel, so that a layer is left dense where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from sparseserve.serving.kernels import DENSE, LinearSpec, LoadedWeight


class EngineDense:
    """The dense product that an engine would run, to be timed beside the 2:4 kernels.

    On a CPU it is oneDNN's on a weight in an order of its own, and faster than torch's on long
    prompts. A plan never holds it: a layer that is best dense is left to vLLM whole, so it may
    keep the layer it made last.
    """

    layout: ClassVar[str] = DENSE
    largest_batch: ClassVar[int | None] = None

    def __init__(self, method: UnquantizedLinearMethod) -> None:
        self._method = method
        self._layer = nn.Module()

    def unsupported(self, spec: LinearSpec) -> str | None:
        """Run everything but layers that compute in int8."""
        return spec.float_refusal()

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Make a layer of it; return the weight, whose size is the size of any order of it."""
        dense = weight.dense()
        self._layer = nn.Module()
        self._layer.register_parameter("weight", Parameter(dense, requires_grad=False))
        self._method.process_weights_after_loading(self._layer)
        return (dense,)

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        """Multiply as the engine would."""
        product: Tensor = self._method.apply(self._layer, inputs, bias)
        return product
