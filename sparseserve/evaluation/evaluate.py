"""Measuring the perplexity of a checkpoint of any format, under transformers or vLLM."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.checkpoint.verification import check_before_reading
from sparseserve.devices import default_device, dtype_name, evaluation_dtype
from sparseserve.evaluation.contamination import assert_not_calibration
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.evaluation.protocols import WIKITEXT2, Protocol, wikitext2_windows
from sparseserve.huggingface.checkpoint_model import open_checkpoint
from sparseserve.huggingface.opening import open_config, open_tokenizer
from sparseserve.machine import this_machine
from sparseserve.models.loading import load_model
from sparseserve.models.model_folder import check_model_folder, find_model_folder
from sparseserve.report import PerplexityResult
from sparseserve.serving.measure.perplexity import vllm_perplexity
from sparseserve.text import (
    TextFile,
    TextSource,
    evaluation_windows,
    fit_sequence_length,
    position_limit,
    read_text,
    vocabulary_size,
)
from sparseserve.text.windows import require_known_tokens

Backend = Literal["transformers", "vllm"]
OnWindow = Callable[[int, int], None]
DEFAULT_SEQUENCE_LENGTH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSpec:
    """What to evaluate on, and how.

    Attributes:
        text: A file, a folder, a dataset name, or None for the packaged evaluation text.
        samples: Number of windows, spread over the text; None takes all.
        sequence_length: Tokens of a window; None is DEFAULT_SEQUENCE_LENGTH, or what the model
            takes if that is less.
        backend: Which engine runs the model.
        dtype: Floating type to compute in; None is that of the checkpoint where the machine
            computes in it, else float32, so that both backends compute in the same.
        device: Where transformers runs the model; None is a CUDA device if there is one.
        text_column: Column of the text's tables; None is ``text``, or ``messages`` for chats.
        verify: Whether to verify the checkpoint, which must be ours, before it is evaluated.
        protocol: Whose windows to cut. With ``wikitext2`` the text is by default the test split of
            WikiText-2, from the hub, and windows have 2048 tokens. None is this program's own.
    """

    text: str | None = None
    samples: int | None = None
    sequence_length: int | None = None
    backend: Backend = "transformers"
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    text_column: str | None = None
    verify: bool = False
    protocol: Protocol | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """A perplexity and all that it depends on.

    ``tokens`` counts predictions; ``verified`` says whether the checkpoint was verified before.
    """

    perplexity: float
    tokens: int
    windows: int
    sequence_length: int
    text: str
    files: tuple[TextFile, ...]
    model: str
    backend: Backend
    dtype: str
    seconds: float
    verified: bool
    protocol: Protocol | None = None


def evaluate(
    source: str, spec: EvaluationSpec, *, on_window: OnWindow = lambda done, total: None
) -> EvaluationReport:
    """Measure the perplexity of the model ``source``, a folder of any format or a hub name.

    Args:
        source: The checkpoint.
        spec: What to evaluate on, and how.
        on_window: Told how many windows are done, of how many.

    Raises:
        SparseServeError: The model cannot be loaded, the text cannot be used or was used for
            calibration, or the likelihood is not finite.
    """
    folder = find_model_folder(source)
    check_before_reading(folder, verified=spec.verify)
    text = _read(spec)
    assert_not_calibration(folder, text)
    check_evaluated_folder(folder)
    config = open_config(folder)
    windows = _windows(spec, open_tokenizer(folder), text, position_limit(config))
    require_known_tokens(text.name, windows, vocabulary_size(config))
    dtype = spec.dtype or evaluation_dtype(config.dtype, this_machine())
    start = time.perf_counter()
    result = _measure(folder, windows, spec, dtype, on_window)
    return EvaluationReport(
        perplexity=result.perplexity,
        tokens=result.tokens,
        windows=len(windows),
        sequence_length=len(windows[0]),
        text=text.name,
        files=text.files,
        model=source,
        backend=spec.backend,
        dtype=dtype_name(dtype),
        seconds=time.perf_counter() - start,
        verified=spec.verify,
        protocol=spec.protocol,
    )


def load_for_evaluation(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint of any format as a dense transformers model, in evaluation mode.

    Raises:
        UnsupportedModelError: A dense checkpoint is not a causal language model, or incomplete.
        ArtifactError: A packed checkpoint is damaged or incomplete.
    """
    if not _is_packed(folder):
        return load_model(folder, dtype=dtype, check_hashes=False).model
    return open_checkpoint(folder, dtype)


def check_evaluated_folder(folder: Path) -> None:
    """Refuse what is no whole causal language model before anything large is read.

    Raises:
        UnsupportedModelError: It is another kind of model, or part of it is missing.
    """
    if not _is_packed(folder):
        check_model_folder(folder)


def _read(spec: EvaluationSpec) -> TextSource:
    text = WIKITEXT2 if spec.text is None and spec.protocol else spec.text
    return read_text(text, column=spec.text_column, packaged="evaluation")


def _windows(
    spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, text: TextSource, limit: int | None
) -> list[Tensor]:
    asked, samples = spec.sequence_length, spec.samples
    if spec.protocol == "wikitext2":
        return wikitext2_windows(
            tokenizer, text, sequence_length=asked, limit=limit, samples=samples
        )
    length = fit_sequence_length(asked, limit=limit, default=DEFAULT_SEQUENCE_LENGTH)
    return evaluation_windows(tokenizer, text, sequence_length=length, samples=samples)


def _measure(
    folder: Path,
    windows: list[Tensor],
    spec: EvaluationSpec,
    dtype: torch.dtype,
    on_window: OnWindow,
) -> PerplexityResult:
    if spec.backend == "vllm":
        return vllm_perplexity(folder, windows, dtype=dtype, on_window=on_window)
    device = spec.device or default_device()
    return perplexity(load_for_evaluation(folder, dtype).to(device), windows, on_window)


def _is_packed(folder: Path) -> bool:
    is_artifact = (folder / MANIFEST_FILE).is_file()
    return is_artifact and Artifact.open(folder).manifest.format != "dense"
