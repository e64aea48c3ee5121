"""How far a model's next-token predictions are from the text and from those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseserve.checkpoint.tensor_file import HiddenStates
from sparseserve.checkpoint.tensors import writing

# In float32 a probability computed as 1 - p is not known any better than this.
_LEAST_REST = 1e-6


@dataclass(frozen=True, slots=True)
class DensePrediction:
    """What the dense model expects after each of ``T`` tokens but the last.

    Attributes:
        tokens: Ids of the likeliest next tokens, int64 ``[T - 1, likeliest]``.
        log_probabilities: Theirs and, in one more column, that of all other tokens together,
            float32 ``[T - 1, likeliest + 1]``.
    """

    tokens: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True, slots=True)
class StoredPredictions(Sequence[DensePrediction]):
    """Predictions on disk, each read when it is asked for: memory must not grow with their number.

    Attributes:
        tokens: Of all windows.
        log_probabilities: Likewise.
    """

    tokens: HiddenStates
    log_probabilities: HiddenStates

    @classmethod
    def write(cls, folder: Path, predictions: Iterable[DensePrediction]) -> StoredPredictions:
        """Write them, for windows of one length, to ``folder``, which is made.

        Raises:
            ArtifactError: The disk is full or cannot be written.
        """
        with writing(folder):
            folder.mkdir()
        return cls(
            *HiddenStates.write_several(
                [folder / "tokens", folder / "log_probabilities"],
                ((found.tokens, found.log_probabilities) for found in predictions),
            )
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> DensePrediction: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[DensePrediction, ...]: ...
    def __getitem__(self, index: int | slice) -> DensePrediction | tuple[DensePrediction, ...]:
        """Read one, or several."""
        if isinstance(index, slice):
            return tuple(self[number] for number in range(len(self))[index])
        return DensePrediction(self.tokens[index], self.log_probabilities[index])


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids ``[T]`` and, where the loss needs it, what the dense model predicts in them."""

    window: Tensor
    dense: DensePrediction | None


@dataclass(frozen=True, slots=True)
class PredictionLoss:
    """Mean losses in nats a token, scalar tensors.

    ``total`` is the weighted sum that is minimised.
    """

    total: Tensor
    cross_entropy: Tensor


@torch.no_grad()
def dense_predictions(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    likeliest: int,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[DensePrediction]:
    """Yield what ``model``, not yet pruned, predicts in ``windows``, token ids ``[T]`` each.

    Only its ``likeliest`` tokens are told apart, so that this takes little memory for a large
    vocabulary; what is left out is that the others differ among themselves.
    """
    for number, window in enumerate(windows, start=1):
        logits = next_token_logits(model, window)
        tokens = logits.topk(min(likeliest, logits.shape[1])).indices
        rest = logits.scatter(1, tokens, -torch.inf).logsumexp(dim=1, keepdim=True)
        kept = torch.cat((logits.gather(1, tokens), rest), dim=1)
        log_probabilities = kept - logits.logsumexp(dim=1, keepdim=True)
        yield DensePrediction(tokens.cpu(), log_probabilities.cpu())
        on_window(number, len(windows))


def prediction_loss(
    model: PreTrainedModel, example: Example, distillation: float
) -> PredictionLoss:
    """Return ``(1 - distillation) * cross-entropy + distillation * KL(dense || model)``.

    The divergence is between distributions over the likeliest tokens and "any other", which is a
    lower bound of that over the whole vocabulary.
    """
    logits = next_token_logits(model, example.window)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    targets = example.window[1:].to(logits.device)[:, None]
    cross_entropy = (normaliser - logits.gather(1, targets)).mean()
    if not distillation:
        return PredictionLoss(cross_entropy, cross_entropy.detach())
    if example.dense is None:
        raise ValueError("distillation needs the dense model's predictions")
    own = logits.gather(1, example.dense.tokens.to(logits.device)) - normaliser
    divergence = _divergence(example.dense.log_probabilities.to(logits.device), own)
    total = distillation * divergence + (1 - distillation) * cross_entropy
    return PredictionLoss(total, cross_entropy.detach())


def next_token_logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Return float32 logits ``[T - 1, vocabulary]`` for what follows each token but the last."""
    logits: Tensor = model(window[None].to(model.device), use_cache=False).logits
    return logits[0, :-1].float()


def _divergence(dense: Tensor, own: Tensor) -> Tensor:
    """Return the mean KL divergence; ``dense`` has one more column, "any other", than ``own``."""
    rest = (1 - own.exp().sum(dim=1, keepdim=True)).clamp(min=_LEAST_REST).log()
    return mean_divergence(dense, torch.cat((own, rest), dim=1))


def mean_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return the mean over tokens of ``KL(expected || found)`` in nats, at least 0.

    Where the two hardly differ, the sum of rounded terms may fall below zero.

    Args:
        expected: Log-probabilities, ``[..., outcomes]``.
        found: Likewise.
    """
    weights = expected.exp()
    # An outcome of probability 0 has no weight, but log 0.
    products = torch.where(weights > 0, weights * (expected - found), 0)
    return products.sum(dim=-1).mean().clamp_min(0)
