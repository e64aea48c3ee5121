"""An engine of ours is asked what lm-eval asks transformers."""

from __future__ import annotations

import pytest

from sparseserve.errors import RecipeError
from sparseserve.evaluation.task_data import TaskChoice
from sparseserve.evaluation.tasks import require_kinds
from sparseserve.testing import tiny_model, tiny_tokenizer
from tests.unit.evaluation.pruned import marking_tokenizer

pytest.importorskip("lm_eval")
# Raised inside lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("text", ["an answer", "<s>an answer", ""])
def test_an_engine_is_asked_the_tokens_that_lm_eval_asks_transformers(
    text: str,
) -> None:
    from lm_eval.models.huggingface import HFLM

    from sparseserve.evaluation.engine_model import EngineModel

    for tokenizer in (tiny_tokenizer(), marking_tokenizer()):
        theirs = HFLM(pretrained=tiny_model("llama"), tokenizer=tokenizer)
        ours = EngineModel(None, tokenizer, 256)  # type: ignore[arg-type]
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        for special in (True, False):
            expected = theirs.tok_encode(text, add_special_tokens=special)
            assert ours.tok_encode(text, add_special_tokens=special) == expected
        assert ours.prefix_token_id == theirs.prefix_token_id
        assert ours.eot_token_id == theirs.eot_token_id
        assert ours._encode_pair(f"{text}: ", "yes") == theirs._encode_pair(f"{text}: ", "yes")


def test_a_task_that_writes_texts_is_refused_before_an_engine_starts() -> None:
    choice = TaskChoice(None, (), (), {"gsm8k": "generate_until"})
    with pytest.raises(RecipeError, match=r"gsm8k is of the kind generate_until.*transformers"):
        require_kinds("vllm", choice)
    require_kinds("transformers", choice)
