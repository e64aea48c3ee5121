"""How vLLM loads and runs a linear layer whose weight is 2:4.

A vLLM layer may merge several modules of the checkpoint (q, k and v; gate and up), and holds only
this rank's share of them. vLLM's own parameter classes do the cutting: the packed tensors keep
rows first and inputs second, like the dense weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from sparseserve.checkpoint import packed24, quantized24
from sparseserve.checkpoint.quantization import INT8, Quantization
from sparseserve.errors import ArtifactError, ServingError
from sparseserve.serving.kernels import (
    LayerKernels,
    LinearSpec,
    LoadedWeight,
    RowBlock,
    layer_kernels,
    two_four_linear,
    with_dense,
)
from sparseserve.serving.kernels.choice.choose import (
    KERNELS_VARIABLE,
    TimedLayers,
    allowed_kernels,
)
from sparseserve.serving.kernels.cpu.int8_kernels import int8_unsupported
from sparseserve.serving.kernels.table import CPU_INT8
from sparseserve.serving.plugin.engine_dense import EngineDense
from sparseserve.serving.plugin.parameters import (
    LEAVES,
    forget,
    loaded_block,
    register,
    require_loaded,
)
from sparseserve.serving.plugin.shards import (
    CheckpointModule,
    Shard,
    require_whole_bytes,
    require_whole_groups,
    shards_of,
)
from sparseserve.sparsity import TWO_FOUR

logger = init_logger("vllm.sparseserve")


class TwoFourLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is checked as Any
    """What both kinds of checkpoint share: the shards, and the kernels they are given to."""

    def __init__(
        self,
        prefix: str,
        modules: tuple[CheckpointModule, ...],
        timed: TimedLayers | None = None,
    ) -> None:
        self.prefix = prefix
        self.modules = modules
        self._timed = timed
        self.shards: tuple[Shard, ...] = ()
        # vLLM settles its product from the configuration of the moment.
        self._dense = UnquantizedLinearMethod()
        self.kernels: LayerKernels | None = None
        self._plan = ""
        self._packed: tuple[str, ...] = ()

    def settle(self, columns: int, row_counts: list[int], weight: Tensor) -> None:
        """Settle which module gives which rows."""
        self.shards = shards_of(self.prefix, self.modules, row_counts)
        self._spec = LinearSpec(
            rows=sum(row_counts),
            columns=columns,
            dtype=weight.dtype,
            device=weight.device,
            two_four=all(shard.sparse for shard in self.shards),
        )

    def give(self, layer: nn.Module, weight: LoadedWeight) -> None:
        """Choose the kernels and register what they multiply with, in place of ``weight``.

        Raises:
            ServingError: No kernel can run the layer, or the packed form is damaged.
        """
        kernels = with_dense(EngineDense(self._dense))
        chosen = layer_kernels(self._spec, weight, logger.info, kernels, self._timed)
        logger.info_once("2:4 layers: %s", chosen.describe())
        self.kernels = replace(chosen, packed=())  # the layer owns the tensors
        if chosen.plan is None:
            # vLLM's own dense product; on a CPU it moves the weight into oneDNN's layout.
            layer.register_parameter("weight", Parameter(weight.dense(), requires_grad=False))
            self._dense.process_weights_after_loading(layer)
            return
        self._plan = str(chosen.plan)
        self._packed = tuple(f"packed_{number}" for number in range(len(chosen.packed)))
        for name, tensor in zip(self._packed, chosen.packed, strict=True):
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply."""
        if not self._plan:
            product: Tensor = self._dense.apply(layer, x, bias)
            return product
        packed = [getattr(layer, name) for name in self._packed]
        return two_four_linear(x, packed, bias, self._plan, self._spec.rows)


class UnnamedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]  # vLLM is checked as Any
    """How vLLM runs a layer under whose name the checkpoint holds nothing that is packed."""


@register_weight_loader_v2_supported_method
class Packed24LinearMethod(TwoFourLinearMethod):
    """A layer of a ``packed24`` checkpoint, all or some of whose modules are packed."""

    def __init__(
        self,
        prefix: str,
        modules: tuple[CheckpointModule, ...],
        timed: TimedLayers | None = None,
        quantization: Quantization | None = None,
        read_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(prefix, modules, timed)
        self._quantization = quantization or Quantization()
        self._read_dtype = read_dtype

    def create_weights(  # noqa: PLR0917  # vLLM's signature
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register the parameters that the checkpoint's tensors are loaded into.

        Raises:
            ServingError: Tensor parallelism would cut a byte of indices, or a group of inputs with
                one scale, in two.
        """
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        require_whole_bytes(self.prefix, columns, input_size)
        loader = extra_weight_attrs["weight_loader"]
        whole_rows = self._quantization.group_of(input_size) == input_size
        for name, tensor in self._empty(rows, columns, input_size, params_dtype).items():
            of_rows = name == packed24.SCALE and whole_rows
            register(layer, LEAVES[name], tensor, loader, whole_rows=of_rows)
        example = torch.empty(0, dtype=params_dtype)
        self.settle(columns, output_partition_sizes, example)
        if self._computes_in_int8():
            self._spec = replace(self._spec, quantized=INT8)
        # Where nothing is loaded into it, it only shows whether the model replaces its loader.
        device = "meta" if self._spec.two_four else None
        dense = torch.full((rows, columns), torch.nan, dtype=params_dtype, device=device)
        register(layer, "weight", dense, loader)
        self._loader = _loader_of(layer)

    def _computes_in_int8(self) -> bool:
        """Whether the layer multiplies codes; if not, they become a weight while it is loaded."""
        spec = self._spec
        if self._quantization.to != INT8 or not spec.two_four:
            return False
        reason = int8_unsupported(spec.device, spec.rows, spec.columns, spec.dtype)
        if reason is None and CPU_INT8 not in allowed_kernels():
            reason = f"{KERNELS_VARIABLE} leaves it out"
        if reason is not None:
            logger.info_once("int8 layers compute in %s: int8: %s", spec.dtype, reason)
        return reason is None

    def _empty(
        self, rows: int, columns: int, input_size: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        if not self._quantization:
            empty = packed24.not_loaded(rows, columns, dtype)
            return {packed24.VALUES: empty.values, packed24.INDICES: empty.indices}
        try:
            return quantized24.not_loaded(rows, columns, input_size, self._quantization)
        except ArtifactError as error:
            raise ServingError(
                f"{self.prefix}: {error}: use a smaller --tensor-parallel-size"
            ) from error

    def is_loaded_by_the_model(self, layer: nn.Module) -> bool:
        """Whether the model cuts and places the rows of ``layer`` in a way of its own."""
        return _loader_of(layer) != self._loader

    def let_the_model_load(self, layer: nn.Module) -> None:
        """Let vLLM load ``layer`` as it does without us, unpacked; nothing is loaded yet."""
        empty, loader = layer.get_parameter("weight"), _loader_of(layer)
        forget(layer)
        dense = torch.full(empty.shape, torch.nan, dtype=empty.dtype)
        register(layer, "weight", dense, loader)
        layer.quant_method = LoadedDense24LinearMethod(self.prefix, self.modules, self._timed)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all was loaded and give it to the kernels.

        Raises:
            ServingError: A tensor of the checkpoint is missing or damaged.
        """
        weight = LoadedWeight(
            tuple(loaded_block(layer, shard, self._spec, self._read_dtype) for shard in self.shards)
        )
        forget(layer)
        self.give(layer, weight)


class LoadedDense24LinearMethod(TwoFourLinearMethod):
    """A layer that vLLM loads dense, in a way of its own, and that is packed once it is loaded."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Register an ordinary weight, as vLLM does."""
        self._dense.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Give the weight to the kernels if it is 2:4 as a whole; else vLLM runs it.

        Raises:
            ServingError: The files lack the weight, or a part of it.
        """
        weight = layer.get_parameter("weight").data
        # First: what was not loaded is not 2:4 either.
        require_loaded(f"{self.prefix}.weight", weight)
        if TWO_FOUR.first_violation(weight) is not None:
            logger.info_once("%s runs dense: not all of it is %s", self.prefix, TWO_FOUR)
            self._dense.process_weights_after_loading(layer)
            return
        rows, columns = weight.shape
        self._spec = LinearSpec(rows, columns, weight.dtype, weight.device, two_four=True)
        forget(layer)
        self.give(layer, LoadedWeight((RowBlock(self.prefix, weight),)))


@register_weight_loader_v2_supported_method
class Dense24LinearMethod(TwoFourLinearMethod):
    """A layer of a dense checkpoint, served on the promise that its weights are 2:4."""

    def create_weights(  # noqa: PLR0917  # vLLM's signature
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Register an ordinary weight.

        Raises:
            ServingError: Groups of four do not divide this rank's input features.
        """
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        require_whole_groups(self.prefix, columns, input_size)
        dense = torch.full((rows, columns), torch.nan, dtype=params_dtype)
        register(layer, "weight", dense, extra_weight_attrs["weight_loader"])
        self.settle(columns, output_partition_sizes, dense)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the promise and give the weight to the kernels.

        Raises:
            ServingError: The weight is missing, or is not 2:4; names the first place.
        """
        weight = layer.get_parameter("weight").data
        for shard in self.shards:
            rows = weight[shard.start : shard.stop]
            require_loaded(f"{shard.name}.weight", rows)
            if shard.sparse and (violation := TWO_FOUR.first_violation(rows)):
                raise ServingError(
                    f"{shard.name}.weight is not {TWO_FOUR}: {violation}{_rank(layer)}: "
                    "serve it without --quantization sparseserve, or prune it first"
                )
        delattr(layer, "weight")
        self.give(layer, LoadedWeight((RowBlock(self.prefix, weight),)))


def _loader_of(layer: Any) -> object:
    return layer.weight.weight_loader


def _rank(layer: nn.Module) -> str:
    size = getattr(layer, "tp_size", 1)
    return f" of rank {getattr(layer, 'tp_rank', 0)} of {size}" if size > 1 else ""
