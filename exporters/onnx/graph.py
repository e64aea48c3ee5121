"""The ONNX graph of a causal language model, by transformers' own exporter.

One graph does prompts and decoding: its inputs are new tokens, and the keys and values of those
before, of which there may be none. Names of inputs and outputs are those that Optimum began and
onnxruntime-genai reads.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparseserve.errors import ArtifactError, first_line
from sparseserve.huggingface.names import stored_name
from sparseserve.huggingface.opening import only_errors_logged

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# Sizes of the example. They must differ, and the mask must have zeros, or the exporter takes what
# they have in common for a constant.
_BATCH, _PAST, _NEW = 2, 7, 3
_PADDING = 2
# Not what is derived from them, which keeps more: states, or keys of an index.
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
_INPUTS = ("input_ids", "attention_mask", "position_ids")


def export_graph(model: PreTrainedModel, folder: Path, pruned: Sequence[str]) -> None:
    """Write ``model`` to ``folder`` as GRAPH_FILE, its weights as DATA_FILE.

    Args:
        model: In evaluation mode, on a CPU.
        folder: Exists.
        pruned: Names of the pruned modules on disk. The node of each gets its name.

    Raises:
        ArtifactError: The model keeps more than keys and values, or those of different shapes, or
            the exporter fails.
    """
    import onnx_ir

    shapes = _cache_shapes(model)
    made = _exported(model, _example(model, shapes), len(shapes))
    graph = made.graph
    _rename_cache(graph, len(shapes))
    _name_linears(graph, model, frozenset(pruned))
    # The exporter's notes on its passes are longer than the graph.
    for node in graph:
        node.metadata_props.clear()
    onnx_ir.save(made, folder / GRAPH_FILE, external_data=DATA_FILE)


def input_shapes(folder: Path) -> dict[str, tuple[int | None, ...]]:
    """Return the shape of each input of the graph in ``folder``; None for sizes that are free."""
    import onnx

    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    return {
        item.name: tuple(
            size.dim_value if size.HasField("dim_value") else None
            for size in item.type.tensor_type.shape.dim
        )
        for item in graph.input
    }


def require_keys_and_values(model: PreTrainedModel) -> None:
    """Refuse a model whose layers keep what a graph cannot hold; it is run on two tokens.

    Raises:
        ArtifactError: Names the remedy.
    """
    _cache_shapes(model)


def _cache_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Return heads, and widths of keys and values, of each layer that keeps them."""
    with torch.no_grad():
        made = model(torch.zeros(1, 2, dtype=torch.int64), use_cache=True).past_key_values
    layers = getattr(made, "layers", None)
    if not layers or not all(type(layer) in _KEYS_AND_VALUES for layer in layers):
        raise ArtifactError(
            f"{model.config.model_type}: what its layers keep of earlier tokens is more than keys "
            "and values, which the ONNX graph has no inputs for: use --format dense"
        )
    shapes = [(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]
    if len(set(shapes)) > 1:
        raise ArtifactError(
            f"{model.config.model_type}: its layers have attention heads of different numbers or "
            "sizes, and genai_config.json beside the ONNX graph has one figure for all: use "
            "--format dense"
        )
    return shapes


def _example(model: PreTrainedModel, shapes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return inputs as they come in the middle of a text; keys and values are any numbers."""
    # Without the model's configuration every layer keeps all; windows come from the mask.
    cache = DynamicCache()
    dtype = next(model.parameters()).dtype
    for index, (heads, key_width, value_width) in enumerate(shapes):
        keys, values = (
            torch.zeros(_BATCH, heads, _PAST, width, dtype=dtype)
            for width in (key_width, value_width)
        )
        cache.update(keys, values, index)
    mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64)
    mask[0, :_PADDING] = 0
    positions = torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1)
    ids = torch.arange(_BATCH * _NEW).view(_BATCH, _NEW)
    return {**dict(zip(_INPUTS, (ids, mask, positions), strict=True)), "past_key_values": cache}


def _exported(model: PreTrainedModel, example: dict[str, Any], layers: int) -> Any:
    """Return the model as onnx_ir holds it."""
    from torch.export import Dim
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    any_size = Dim.DYNAMIC
    # Keys and values are one flat list: nested ones do not fit the cache's own order.
    shapes = {
        **{name: {0: any_size, 1: any_size} for name in _INPUTS},
        "past_key_values": [{0: any_size, 2: any_size}] * (2 * layers),
    }
    try:
        with _quiet():
            made = OnnxExporter().export(model, example, OnnxConfig(dynamic_shapes=shapes))
            # transformers has wrapped its models ever deeper, from one release to the next.
            program = getattr(made, "program", made)
            return getattr(program, "model", program)
    except Exception as error:  # whatever the tracing of any model's code raises
        raise ArtifactError(
            f"{model.config.model_type}: transformers' ONNX exporter fails on this model "
            f"({first_line(error)}): use --format dense"
        ) from error


def _rename_cache(graph: Any, layers: int) -> None:
    pairs = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    inputs, outputs = graph.inputs[len(_INPUTS) :], graph.outputs[1:]
    for (layer, part), given, made in zip(pairs, inputs, outputs, strict=True):
        given.name = f"past_key_values.{layer}.{part}"
        made.name = f"present.{layer}.{part}"


def _name_linears(graph: Any, model: PreTrainedModel, pruned: frozenset[str]) -> None:
    """Give the product of each pruned module, and its weight, the module's name on disk."""
    for node in graph:
        if node.op_type not in {"MatMul", "Gemm"}:
            continue
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        for module in scopes[-2:-1]:
            if isinstance(getattr(model.get_submodule(module), "weight", None), torch.Tensor):
                name = stored_name(model, module)
                if name in pruned:
                    node.name = name
                    if node.inputs[1].is_initializer():
                        node.inputs[1].name = f"{name}.weight"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters from telling their progress, and what they think of each other."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            only_errors_logged(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
