"""How vLLM loads and runs a linear layer whose weight is 2:4.

A vLLM layer may merge several modules of the checkpoint (q, k and v; gate and up), and holds only
this rank's share of them. vLLM's own parameter classes do the cutting: the packed tensors keep
rows first and inputs second, like the dense weight.

vLLM does not check that every weight of a quantized checkpoint was there to load. So parameters
start as what no checkpoint can hold (NaN values, indices that do not ascend), and a layer that
still has any of it after loading is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import ModelWeightParameter

from sparseserve.errors import ServingError
from sparseserve.serving.kernels import (
    LayerKernels,
    LinearSpec,
    LoadedWeight,
    RowBlock,
    layer_kernels,
    two_four_linear,
    with_dense,
)
from sparseserve.serving.kernels.choice.choose import TimedLayers
from sparseserve.serving.plugin.engine_dense import EngineDense
from sparseserve.sparsity import TWO_FOUR, Packed24

logger = init_logger("vllm.sparseserve")

NOT_LOADED = "is missing, not whole or holds NaN: check the folder with sparseserve verify"


@dataclass(frozen=True, slots=True)
class CheckpointModule:
    """A linear module by its name in the checkpoint; ``sparse`` if it is, or must be, 2:4."""

    name: str
    sparse: bool


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows ``start`` to ``stop`` of a layer, which come from one checkpoint module."""

    name: str
    sparse: bool
    start: int
    stop: int


def shards_of(
    prefix: str, modules: tuple[CheckpointModule, ...], row_counts: list[int]
) -> tuple[Shard, ...]:
    """Return which rows of the layer ``prefix`` come from which module.

    Args:
        prefix: vLLM's name of the layer.
        modules: The checkpoint modules merged into it, in the order of their rows.
        row_counts: Rows of each part of the layer on this rank.

    Raises:
        ServingError: Only some modules are sparse and vLLM does not say which rows they have.
    """
    if len({module.sparse for module in modules}) == 1 and len(modules) != len(row_counts):
        name = modules[0].name if len(modules) == 1 else prefix
        return (Shard(name, modules[0].sparse, 0, sum(row_counts)),)
    if len(modules) != len(row_counts):
        raise ServingError(
            f"{prefix}: some of its {len(modules)} modules are packed and some not, but vLLM runs "
            f"it in {len(row_counts)} parts: prune all of them, or none with --ignore"
        )
    starts = [sum(row_counts[:index]) for index in range(len(row_counts))]
    return tuple(
        Shard(module.name, module.sparse, start, start + rows)
        for module, start, rows in zip(modules, starts, row_counts, strict=True)
    )


class _TwoFourLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is checked as Any
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


@register_weight_loader_v2_supported_method
class Packed24LinearMethod(_TwoFourLinearMethod):
    """A layer of a ``packed24`` checkpoint, all or some of whose modules are packed."""

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
            ServingError: Tensor parallelism would cut a byte of indices in two.
        """
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        require_whole_bytes(self.prefix, columns, input_size)
        loader = extra_weight_attrs["weight_loader"]
        values = torch.full((rows, columns // 2), torch.nan, dtype=params_dtype)
        indices = torch.zeros((rows, -(-columns // 8)), dtype=torch.uint8)
        _register(layer, "weight_values", values, loader)
        _register(layer, "weight_indices", indices, loader)
        self.settle(columns, output_partition_sizes, values)
        if not all(shard.sparse for shard in self.shards):
            dense = torch.full((rows, columns), torch.nan, dtype=params_dtype)
            _register(layer, "weight", dense, loader)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all was loaded and give it to the kernels.

        Raises:
            ServingError: A tensor of the checkpoint is missing or damaged.
        """
        weight = LoadedWeight(tuple(_loaded_block(layer, shard) for shard in self.shards))
        for name in ("weight_values", "weight_indices", "weight"):
            if hasattr(layer, name):
                delattr(layer, name)
        self.give(layer, weight)


@register_weight_loader_v2_supported_method
class Dense24LinearMethod(_TwoFourLinearMethod):
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
        _register(layer, "weight", dense, extra_weight_attrs["weight_loader"])
        self.settle(columns, output_partition_sizes, dense)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check the promise and give the weight to the kernels.

        Raises:
            ServingError: The weight is missing, or is not 2:4; names the first place.
        """
        weight = layer.get_parameter("weight").data
        for shard in self.shards:
            rows = weight[shard.start : shard.stop]
            _require_loaded(f"{shard.name}.weight", rows)
            if shard.sparse and (violation := TWO_FOUR.first_violation(rows)):
                raise ServingError(
                    f"{shard.name}.weight is not {TWO_FOUR}: {violation}{_rank(layer)}: "
                    "serve it without --quantization sparseserve, or prune it first"
                )
        delattr(layer, "weight")
        self.give(layer, LoadedWeight((RowBlock(self.prefix, weight),)))


def chosen_kernels(model: nn.Module) -> dict[str, LayerKernels]:
    """Return how each 2:4 layer of a loaded model is run, by vLLM's name of the layer."""
    methods = {
        name: method
        for name, layer in model.named_modules()
        if isinstance(method := getattr(layer, "quant_method", None), _TwoFourLinearMethod)
    }
    return {name: method.kernels for name, method in methods.items() if method.kernels}


def require_whole_groups(prefix: str, columns: int, input_size: int) -> None:
    """Refuse a share of the input features that cuts a group of four.

    Raises:
        ServingError: Names the layer and both figures.
    """
    _require_multiple(prefix, columns, input_size, TWO_FOUR.column_multiple)


def require_whole_bytes(prefix: str, columns: int, input_size: int) -> None:
    """Refuse a share of the input features that cuts a byte of indices, which holds two groups.

    A layer that is not cut may end in half a byte.

    Raises:
        ServingError: Names the layer and both figures.
    """
    groups = 1 if columns == input_size else 2
    _require_multiple(prefix, columns, input_size, groups * TWO_FOUR.column_multiple)


def _require_multiple(prefix: str, columns: int, input_size: int, multiple: int) -> None:
    if columns % multiple == 0:
        return
    share = f", cut into {input_size // columns}," if columns != input_size else ""
    remedy = "use a smaller --tensor-parallel-size" if share else "it cannot be 2:4"
    raise ServingError(
        f"{prefix}: {input_size} input features{share} give {columns}, "
        f"not a multiple of {multiple}: {remedy}"
    )


def _register(layer: nn.Module, name: str, data: Tensor, loader: object) -> None:
    parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    layer.register_parameter(name, parameter)


def _loaded_block(layer: nn.Module, shard: Shard) -> RowBlock:
    rows = slice(shard.start, shard.stop)
    if not shard.sparse:
        dense = layer.get_parameter("weight").data[rows]
        _require_loaded(f"{shard.name}.weight", dense)
        return RowBlock(shard.name, dense)
    values = layer.get_parameter("weight_values").data[rows]
    indices = layer.get_parameter("weight_indices").data[rows]
    _require_loaded(f"{shard.name}.weight_values", values)
    # Positions ascend, so the low half of a byte that was loaded is never zero.
    if bool((indices == 0).any()):
        raise ServingError(f"{shard.name}.weight_indices {NOT_LOADED}")
    return RowBlock(shard.name, Packed24(values, indices))


def _require_loaded(name: str, tensor: Tensor) -> None:
    if bool(tensor.isnan().any()):
        raise ServingError(f"{name} {NOT_LOADED}")


def _rank(layer: nn.Module) -> str:
    size = getattr(layer, "tp_size", 1)
    return f" of rank {getattr(layer, 'tp_rank', 0)} of {size}" if size > 1 else ""
