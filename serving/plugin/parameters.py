"""The parameters that the tensors of a checkpoint are loaded into, and whether they were.

vLLM does not check that every weight of a quantized checkpoint was there to load. So parameters
start as what no checkpoint can hold (NaN, codes that do not exist, indices that do not ascend),
and a layer that still has any of it after loading is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from sparseserve.checkpoint import packed24, quantized24
from sparseserve.errors import ServingError
from sparseserve.serving.kernels import LinearSpec, RowBlock
from sparseserve.serving.plugin.shards import Shard

#: Names of the parameters of a packed layer, by the last parts of a checkpoint's names. The values
#: are not called ``weight``, as there: several modules may share a layer, and some models turn
#: what they call a weight.
LEAVES = {
    packed24.VALUES: "weight_values",
    packed24.INDICES: "weight_indices",
    packed24.SCALE: "weight_scale",
}

NOT_LOADED = "is missing, not whole or holds NaN: check the folder with sparseserve verify"


def register(
    layer: nn.Module, name: str, data: Tensor, loader: object, *, whole_rows: bool = False
) -> None:
    """Register a parameter whose first dimension are outputs and whose second are inputs.

    With ``whole_rows`` there is one value for a row, whatever share of the inputs this rank has.
    """
    if whole_rows:
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    else:
        parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    layer.register_parameter(name, parameter)


def forget(layer: nn.Module) -> None:
    """Remove the parameters that the checkpoint's tensors were, or would be, loaded into."""
    for name in (*LEAVES.values(), "weight"):
        if hasattr(layer, name):
            delattr(layer, name)


def loaded_block(
    layer: nn.Module, shard: Shard, spec: LinearSpec, read_dtype: torch.dtype | None
) -> RowBlock:
    """Return the rows of ``shard`` as they were loaded.

    Args:
        layer: Holds the parameters.
        shard: Which rows.
        spec: What the kernels are told of the layer.
        read_dtype: What code times scale is rounded to; None where values are no codes.

    Raises:
        ServingError: They were not; names the tensor.
    """
    rows = slice(shard.start, shard.stop)
    if not shard.sparse:
        dense = layer.get_parameter("weight").data[rows]
        require_loaded(f"{shard.name}.weight", dense)
        return RowBlock(shard.name, dense)
    there = [name for name in LEAVES.values() if hasattr(layer, name)]
    parts = [layer.get_parameter(name).data[rows] for name in there]
    if read_dtype is None:
        return RowBlock(shard.name, _loaded_values(shard.name, *parts))
    quantized = _loaded_codes(shard.name, *parts, read_dtype=read_dtype)
    if spec.quantized:
        return RowBlock(shard.name, quantized)
    packed = quantized.dequantized()
    return RowBlock(shard.name, packed24.Packed24(packed.values.to(spec.dtype), packed.indices))


def _loaded_values(name: str, values: Tensor, indices: Tensor) -> packed24.Packed24:
    packed = packed24.Packed24(values, indices)
    if missing := packed24.missing_tensor(packed):
        raise ServingError(f"{name}.{missing} {NOT_LOADED}")
    return packed


def _loaded_codes(
    name: str, values: Tensor, indices: Tensor, scale: Tensor, *, read_dtype: torch.dtype
) -> quantized24.Quantized24:
    if missing := quantized24.missing_tensor(values, indices, scale):
        raise ServingError(f"{name}.{missing} {NOT_LOADED}")
    return quantized24.from_stored(values, indices, scale, read_dtype)


def require_loaded(name: str, tensor: Tensor) -> None:
    """Refuse a dense tensor that was not loaded, or not whole.

    Raises:
        ServingError: Names it.
    """
    if bool(tensor.isnan().any()):
        raise ServingError(f"{name} {NOT_LOADED}")
