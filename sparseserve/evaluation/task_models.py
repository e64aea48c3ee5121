"""Checkpoints as lm-eval sees models: run by transformers, or by a vLLM engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparseserve.devices import default_device
from sparseserve.evaluation.evaluate import Backend, load_for_evaluation
from sparseserve.huggingface.opening import open_tokenizer
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options
from sparseserve.text import position_limit

if TYPE_CHECKING:
    from lm_eval.api.model import LM

#: Longer questions lose their beginning, with either backend, so that both see the same.
LONGEST = 8192
_USUAL = 512


@contextmanager
def task_model(
    folder: Path,
    backend: Backend,
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    batch_size: int,
) -> Iterator[LM]:
    """Open a checkpoint of any format for lm-eval.

    Args:
        folder: The checkpoint.
        backend: What runs it.
        dtype: Floating type to compute in.
        device: Where transformers runs it; None is a CUDA device if there is one.
        batch_size: Answers that are computed at once.

    Raises:
        SparseServeError: The model cannot be loaded or served.
        MissingExtraError: vLLM is not installed.
    """
    if backend == "vllm":
        with _vllm(folder, dtype, batch_size) as model:
            yield model
    else:
        yield _transformers(folder, dtype, device or default_device(), batch_size)


def _transformers(folder: Path, dtype: torch.dtype, device: torch.device, batch_size: int) -> LM:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415  # optional

    model = load_for_evaluation(folder, dtype).to(device)
    with _without_advice("lm_eval.models.huggingface"):  # a model that is open is what we want
        return HFLM(
            pretrained=model,
            tokenizer=open_tokenizer(folder),
            batch_size=batch_size,
            max_length=min(position_limit(model.config) or LONGEST, LONGEST),
        )


@contextmanager
def _vllm(folder: Path, dtype: torch.dtype, batch_size: int) -> Iterator[LM]:
    from sparseserve.evaluation.engine_model import EngineModel  # noqa: PLC0415  # optional

    served = ServedModel.open(folder)
    longest = min(served.max_positions or LONGEST, LONGEST)
    options = engine_options(
        served,
        max_model_len=longest + 1,  # vLLM always makes one token more
        max_num_seqs=batch_size,
        batch_model_len=_USUAL,
        dtype=dtype,
    )
    with Engine(options) as engine:
        yield EngineModel(engine, open_tokenizer(folder), longest)


@contextmanager
def _without_advice(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
