"""The tiny models are what tests take them for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.testing import TINY_FAMILIES, TINY_VOCABULARY, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_tiny_model_is_the_same_for_the_same_seed_only(family: str) -> None:
    first, again, other = (tiny_model(family, seed).state_dict() for seed in (3, 3, 4))

    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_building_a_model_does_not_disturb_the_random_numbers_of_its_caller() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)

    tiny_model("llama")

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_tiny_model_tells_the_past_and_not_the_future(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.arange(20)[None]
    early, late = tokens.clone(), tokens.clone()
    early[0, 0] = late[0, -1] = 99

    with torch.no_grad():
        before, after_late, after_early = (
            model(ids, use_cache=False).logits for ids in (tokens, late, early)
        )

    assert torch.equal(before[:, :-1], after_late[:, :-1])
    assert (before[:, 1] - after_early[:, 1]).abs().max() > 1e-3


# A special token written out in the text is read as that token, as in any tokenizer.
@given(st.text().filter(lambda text: not any(s in text for s in ("<s>", "</s>", "<pad>"))))
def test_the_tiny_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = tiny_tokenizer()

    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert len(tokens) == len(text.encode())
    assert all(0 <= token < TINY_VOCABULARY for token in tokens)
    assert tokenizer.decode(tokens) == text
