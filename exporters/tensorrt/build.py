"""Building an engine with TensorRT's Python API.

Not yet run on hardware. The same calls run without a card on TensorRT-RTX, whose builder needs
none, in a test with an environment of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sparseserve.errors import ArtifactError
from sparseserve.exporters.tensorrt.settings import InputRange
from sparseserve.exporters.tensorrt.sparsity_log import Tactic


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, and everything that TensorRT said while it was built."""

    engine: bytes
    log: str


def build_engine(trt: ModuleType, graph: Path, ranges: Sequence[InputRange]) -> Built:
    """Build the engine of an ONNX graph, with sparse weights allowed.

    Args:
        trt: ``tensorrt``, or ``tensorrt_rtx``, which has the same builder.
        graph: The ONNX file; its weights lie beside it.
        ranges: Of all inputs.

    Raises:
        ArtifactError: TensorRT does not understand the graph, or cannot build it.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ArtifactError(f"{graph}: TensorRT does not understand it ({errors})")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for item in ranges:
        profile.set_shape(item.name, item.smallest, item.best, item.largest)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ArtifactError(f"{graph}: TensorRT built no engine ({logger.last()})")
    return Built(bytes(engine), logger.text())


def tactics(trt: ModuleType, engine: bytes) -> list[Tactic]:
    """Return which kernel each layer of an engine runs; this needs a card."""
    runtime = trt.Runtime(_logger(trt))
    inspector = runtime.deserialize_cuda_engine(engine).create_engine_inspector()
    said = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    layers = [layer for layer in said.get("Layers", ()) if isinstance(layer, dict)]
    return [Tactic(layer.get("Name", ""), layer.get("TacticName", "")) for layer in layers]


def _logger(trt: ModuleType) -> Any:
    base: type = trt.ILogger

    class Keeping(base):  # type: ignore[misc]  # TensorRT's class is known when it is imported
        """Keeps what TensorRT says, one message a line."""

        def __init__(self) -> None:
            super().__init__()
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self._lines.append(f"[{severity}] {message}")

        def text(self) -> str:
            return "\n".join(self._lines)

        def last(self) -> str:
            return self._lines[-1] if self._lines else "it says nothing"

    return Keeping()
