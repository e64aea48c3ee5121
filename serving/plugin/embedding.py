"""How vLLM keeps and runs an embedding, or an output head, on a CPU.

Neither is pruned. But vLLM keeps them in the dtype it computes in, and an output head once more in
oneDNN's layout: in a small model with 2:4 layers, that is most of the memory. Where 16-bit values
are exact, one copy of them in panels serves both the look-up and the product, which is faster, too.
Elsewhere, and on a GPU, vLLM's own method runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from sparseserve.errors import ServingError
from sparseserve.serving.kernels import LinearSpec, LoadedWeight, RowBlock, two_four_linear
from sparseserve.serving.kernels.choice.choose import allowed_kernels
from sparseserve.serving.kernels.choice.plan import KernelPlan, PlanStep
from sparseserve.serving.kernels.cpu.layout import dense_panel_rows
from sparseserve.serving.kernels.table import CPU_BF16_DENSE, CPU_DENSE
from sparseserve.serving.plugin.parameters import NOT_LOADED

logger = init_logger("vllm.sparseserve")

# Nothing is timed: an output head multiplies the last token of each sequence, never a whole prompt.
# The first that runs it is taken, and they read the same panels.
_KERNELS = (CPU_BF16_DENSE, CPU_DENSE)


class PanelEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is checked as Any
    """An embedding, an output head, or both in one, kept once."""

    def __init__(self, prefix: str) -> None:
        """Keep the module ``prefix``, which vLLM may leave empty."""
        self.prefix = prefix
        self._dense = UnquantizedEmbeddingMethod()
        self._spec: LinearSpec | None = None
        self._plan = ""

    def create_weights(self, layer: nn.Module, *sizes: object, **attributes: object) -> None:
        """Register the weight as vLLM does, filled with what no checkpoint can hold."""
        self._dense.create_weights(layer, *sizes, **attributes)
        layer.get_parameter("weight").data.fill_(torch.nan)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let the embedding be the output head: two modules would keep two copies in panels.

        A head with a bias stays a module of its own, and so does any on a GPU.
        """
        on_cpu = embed_tokens.get_parameter("weight").device.type == "cpu"
        if on_cpu and getattr(layer, "bias", None) is None:
            # vLLM's Transformers backend asks its output head for one.
            embed_tokens.register_parameter("bias", None)
            return embed_tokens
        own: nn.Module = self._dense.tie_weights(layer, embed_tokens)
        return own

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keep the weight in panels alone, where that is less.

        Raises:
            ServingError: No file held the weight.
        """
        dense = layer.get_parameter("weight").data
        if bool(dense.isnan().any()):
            name = f"{self.prefix}.weight" if self.prefix else "the weight of the embedding"
            raise ServingError(f"{name} {NOT_LOADED}")
        rows, columns = dense.shape
        weight = LoadedWeight((RowBlock(self.prefix, dense),))
        spec = LinearSpec(rows, columns, dense.dtype, dense.device, two_four=False)
        allowed = allowed_kernels()
        able = [
            name for name in _KERNELS if name in allowed and not allowed[name].unsupported(spec)
        ]
        # Of float32 values the kernel is slower than oneDNN's.
        if not able or weight.storage_dtype() == torch.float32:
            self._dense.process_weights_after_loading(layer)
            return
        self._spec = spec
        self._plan = str(KernelPlan((PlanStep(able[0], first=0, stop=1, largest_batch=0),)))
        (panels,) = allowed[able[0]].pack(weight, spec)
        # Some models ask for its dtype, such as Gemma in vLLM's Transformers backend, and a draft
        # model shares it only if it has the draft's width. It has a shape, and one value in memory.
        shaped = torch.zeros(1, dtype=dense.dtype, device=dense.device).expand(rows, columns)
        layer.register_parameter("weight", Parameter(shaped, requires_grad=False))
        layer.register_parameter("panels", Parameter(panels, requires_grad=False))
        logger.info_once("embedding %d x %d in %s: %s", rows, columns, panels.dtype, able[0])

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Look up the rows of ``input_``, of any shape."""
        if self._spec is None:
            found: Tensor = self._dense.embedding(layer, input_)
            return found
        panels = layer.get_parameter("panels")
        rows = dense_panel_rows(panels, input_.reshape(-1), self._spec.columns)
        return rows.to(self._spec.dtype).view(*input_.shape, self._spec.columns)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply as an output head."""
        if self._spec is None:
            product: Tensor = self._dense.apply(layer, x, bias)
            return product
        panels = layer.get_parameter("panels")
        return two_four_linear(x, [panels], bias, self._plan, self._spec.rows)
