"""An engine of the whole model by torch-tensorrt. Not yet run on hardware."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import torch

from sparseserve.exporters.tensorrt.settings import TensorRTSettings
from sparseserve.huggingface.checkpoint_model import open_checkpoint


def compile_engine(checkpoint: Path, settings: TensorRTSettings, dtype: str) -> tuple[bytes, str]:
    """Return the serialised engine of the prompt, without a cache, and what was logged.

    Args:
        checkpoint: Of ours, of a format that weights are read from.
        settings: The largest batch and prompt.
        dtype: Of the weights, such as ``float16``.
    """
    import torch_tensorrt

    model = open_checkpoint(checkpoint, getattr(torch, dtype)).cuda()
    model.config.use_cache = False
    ids = torch.zeros(2, 8, dtype=torch.int64, device="cuda")
    batch = torch.export.Dim("batch", min=1, max=settings.max_batch)
    tokens = torch.export.Dim("tokens", min=1, max=settings.max_new)
    shapes = {"input_ids": {0: batch, 1: tokens}}
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logger = logging.getLogger("torch_tensorrt")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(said):
            engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                kwarg_inputs={"input_ids": ids},
                sparse_weights=True,
                require_full_compilation=True,
            )
    finally:
        logger.removeHandler(handler)
    return bytes(engine), said.getvalue()
