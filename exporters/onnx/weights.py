"""The weights of an ONNX graph: whether it is well formed, and every pruned module obeys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import Manifest
from sparseserve.errors import ArtifactError, first_line
from sparseserve.exporters.onnx.graph import GRAPH_FILE
from sparseserve.sparsity import SparsityPattern

if TYPE_CHECKING:
    import onnx

# What may stand between a weight and its product without changing the pattern.
_TRANSPARENT = frozenset({"Transpose", "Cast", "Identity"})


def checked_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Check the graph in ``folder``, and that each pruned module obeys along its inputs.

    Returns:
        The weights ``[out, in]`` of all products, by the names of their nodes.

    Raises:
        ArtifactError: ONNX's own checker refuses the graph, a pruned module has no product in it,
            or its weight does not obey the pattern.
    """
    import onnx

    path = folder / GRAPH_FILE
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path)
    except Exception as error:  # of many kinds: protobuf's, the checker's, the system's
        raise ArtifactError(f"{path}: is no valid ONNX graph ({first_line(error)})") from error
    pattern = SparsityPattern.parse(manifest.pattern)
    found = dict(linear_weights(model.graph))
    for module in manifest.pruned:
        if module not in found:
            raise ArtifactError(f"{path}: no product is that of {module}: export it again")
        if violation := pattern.first_violation(found[module]):
            raise ArtifactError(f"{path}: {module} is not {pattern}: {violation}")
    return found


def linear_weights(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight ``[out, in]`` of every product with a stored matrix, by its node's name."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type not in {"MatMul", "Gemm"}:
            continue
        name, turned = node.input[1], _attribute(node, "transB")
        while name in made_by and made_by[name].op_type in _TRANSPARENT:
            turned ^= made_by[name].op_type == "Transpose"
            name = made_by[name].input[0]
        if name in stored and len(stored[name].dims) == 2:
            weight = as_tensor(stored[name])
            yield node.name, weight if turned else weight.T


def as_tensor(stored: onnx.TensorProto) -> Tensor:
    """Return a stored tensor; numpy has no bfloat16."""
    import onnx

    array = onnx.numpy_helper.to_array(stored)
    if stored.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _attribute(node: onnx.NodeProto, name: str) -> bool:
    return any(item.name == name and item.i == 1 for item in node.attribute)
