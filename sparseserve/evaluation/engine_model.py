"""A vLLM engine of ours as lm-eval sees a model.

lm-eval has its own, which looks for vLLM under the name of one package, so that it finds none on a
CPU, and starts the engine with other options than those that we serve and measure with. Import this
only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval.api.model import TemplateLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparseserve.serving.measure.engine import Engine

#: What such a model can do, by lm-eval's kinds of tasks.
KINDS = frozenset({"multiple_choice", "loglikelihood"})
# Sequences that are handed over at once; the engine makes its own batches of them.
_AT_ONCE = 256

Request = tuple[tuple[str, str], list[int], list[int]]


class EngineModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """Gives lm-eval the likelihood of answers; does not write texts."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token that an answer without a question stands after."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: object
    ) -> list[int]:
        """Return token ids; a text that already begins with the mark of a beginning gets no other.

        Both are what lm-eval does for transformers.
        """
        if add_special_tokens is None:
            mark = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(mark)
        return [*map(int, self.tokenizer.encode(string, add_special_tokens=add_special_tokens))]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **options: object
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for start in range(0, len(requests), _AT_ONCE):
            some = requests[start : start + _AT_ONCE]
            sequences = [(question + answer)[-self.max_length :] for _, question, answer in some]
            found += self.engine.continuation_likelihoods(
                sequences, [len(answer) for _, _, answer in some]
            )
        for (texts, _, _), likelihood in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, likelihood)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[object], disable_tqdm: bool = False
    ) -> list[float]:
        """Do nothing: tasks that need it are refused before, by their kind."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[object], disable_tqdm: bool = False) -> list[str]:
        """Do nothing: tasks that need it are refused before, by their kind."""
        raise NotImplementedError
