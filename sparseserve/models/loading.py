"""Loading a dense causal language model and its tokenizer, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.errors import NumericalError, UnsupportedModelError
from sparseserve.models.model_folder import check_model_folder, find_model_folder, first_line


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model ready to be pruned.

    Attributes:
        model: In evaluation mode, on the CPU, without gradients.
        tokenizer: The tokenizer it came with.
        source: What the user called it: a folder or a hub name.
        folder: Where its files lie on this machine.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    folder: Path


def load_model(
    source: str | Path, *, dtype: torch.dtype | None = None, check_hashes: bool = True
) -> LoadedModel:
    """Load the causal language model ``source`` with its tokenizer.

    Only safetensors are read and no code that comes with a model is run.

    Args:
        source: A local folder or a name on the Hugging Face hub.
        dtype: Floating type of the weights; the checkpoint's own when left out.
        check_hashes: Whether to compare a checkpoint of ours with its hashes. Whoever writes
            another checkpoint from it must, or the new hashes would vouch for damage.

    Raises:
        ArtifactError: A checkpoint of ours is damaged, or holds a file that it does not list.
        UnsupportedModelError: There is no such model, it is not a dense causal language model, or
            its checkpoint or tokenizer is incomplete.
        NumericalError: A weight is NaN or infinite.
    """
    folder = find_model_folder(source)
    check_model_folder(folder)
    if check_hashes and (folder / MANIFEST_FILE).exists():
        Artifact.open(folder).check_hashes()
    tokenizer = _load_tokenizer(folder)
    model = _load_weights(folder, dtype)
    _refuse_non_finite(model, folder)
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, str(source), folder)


def _load_weights(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    try:
        with _only_errors_logged():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    _refuse_missing(folder, loading["missing_keys"])
    for name, stored, expected in loading["mismatched_keys"]:
        raise UnsupportedModelError(
            f"{folder}: tensor {name} is {list(stored)}, but config.json asks for "
            f"{list(expected)}: the two do not belong together"
        )
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        with _only_errors_logged():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise _no_tokenizer(folder, first_line(error)) from error
    # With no tokenizer files at all, transformers may build a tokenizer without any words.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise _no_tokenizer(folder, "its files are missing")
    return tokenizer


def _no_tokenizer(folder: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder} has no usable tokenizer ({reason}): copy tokenizer.json and "
        "tokenizer_config.json from the original model"
    )


def _refuse_missing(folder: Path, names: Collection[str]) -> None:
    if names:
        raise UnsupportedModelError(
            f"{folder}: {len(names)} tensors are missing from the checkpoint, the first is "
            f"{min(names)}: download it again"
        )


def _refuse_non_finite(model: PreTrainedModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        finite = torch.isfinite(parameter)
        if not bool(finite.all()):
            raise NumericalError(
                f"{folder}: tensor {name} has {int((~finite).sum())} NaN or infinite values of "
                f"{parameter.numel()}: the checkpoint is damaged, or overflows in "
                f"{str(parameter.dtype).removeprefix('torch.')}"
            )


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Keep transformers from logging a table about what is then raised as one line."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
