"""Loading a dense causal language model and its tokenizer, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact
from sparseserve.errors import NumericalError, UnsupportedModelError
from sparseserve.huggingface.mapped_weights import mapped_weights
from sparseserve.huggingface.opening import OpenedWeights, open_tokenizer, open_weights
from sparseserve.huggingface.unread import surplus_layer
from sparseserve.models.model_folder import check_model_folder, find_model_folder


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model ready to be pruned.

    Attributes:
        model: In evaluation mode, on the CPU, without gradients.
        tokenizer: The tokenizer it came with.
        source: What the user called it: a folder or a hub name.
        folder: Where its files lie on this machine.
        unread: Tensors in these files that the model has no place for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    folder: Path
    unread: tuple[str, ...] = ()


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    check_hashes: bool = True,
    scratch: Path | None = None,
) -> LoadedModel:
    """Load the causal language model ``source`` with its tokenizer.

    Only safetensors are read and no code that comes with a model is run.

    Args:
        source: A local folder or a name on the Hugging Face hub.
        dtype: Floating type of the weights; the checkpoint's own when left out.
        check_hashes: Whether to compare a checkpoint of ours with its hashes. Whoever writes
            another checkpoint from it must, or the new hashes would vouch for damage.
        scratch: Folder whose disk holds the tensors that must be converted; None for memory.

    Raises:
        ArtifactError: A checkpoint of ours is damaged, or holds a file that it does not list, or
            the disk of ``scratch`` is full.
        UnsupportedModelError: There is no such model, it is not a dense causal language model, or
            its checkpoint or tokenizer is incomplete.
        NumericalError: A weight is NaN or infinite.
    """
    folder = find_model_folder(source)
    check_model_folder(folder)
    if check_hashes and (folder / MANIFEST_FILE).exists():
        Artifact.open(folder).check_hashes()
    tokenizer = open_tokenizer(folder)
    with nullcontext() if scratch is None else mapped_weights(scratch):
        opened = _load_weights(folder, dtype)
    if name := surplus_layer(opened.model, opened.unread):
        raise UnsupportedModelError(
            f"{folder}: holds tensor {name}, but config.json asks for fewer layers: restore the "
            "original config.json"
        )
    _refuse_non_finite(opened.model, folder)
    opened.model.eval().requires_grad_(False)
    return LoadedModel(opened.model, tokenizer, str(source), folder, opened.unread)


def _load_weights(folder: Path, dtype: torch.dtype | None) -> OpenedWeights:
    opened = open_weights(folder, dtype)
    _refuse_missing(folder, opened.missing)
    for wrong in opened.mismatched:
        raise UnsupportedModelError(
            f"{folder}: tensor {wrong.name} is {list(wrong.stored)}, but config.json asks for "
            f"{list(wrong.expected)}: the two do not belong together"
        )
    return opened


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
