"""What an engine finds, and what becomes of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparseserve.errors import ServingError
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options
from sparseserve.serving.measure.perplexity import engine_perplexity

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_perplexity_of_windows_as_long_as_the_model_takes(pair: tuple[Path, Path]) -> None:
    packed, dense = pair
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(256, (length,), generator=generator) for length in (256, 40)]
    options = engine_options(ServedModel.open(packed), max_model_len=257, dtype=torch.float32)
    with Engine(options) as engine:
        found = engine_perplexity(engine, windows)
        ((end, _),) = engine.continuation_likelihoods([windows[1].tolist()], [39])
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        total = sum(
            float(
                torch.nn.functional.cross_entropy(
                    model(window[None]).logits[0, :-1].double(), window[1:], reduction="sum"
                )
            )
            for window in windows
        )
        alone = model(windows[1][None], labels=windows[1][None]).loss
    assert end == pytest.approx(-39 * float(alone), rel=1e-5)
    assert found.tokens == 255 + 39
    assert found.perplexity == pytest.approx(torch.tensor(total / 294).exp().item(), rel=1e-5)


@pytest.mark.further
def test_the_ends_of_sequences_are_as_likely_as_transformers_says(pair: tuple[Path, Path]) -> None:
    packed, dense = pair
    model = AutoModelForCausalLM.from_pretrained(dense)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(256, (length,), generator=generator) for length in (50, 9, 30)]
    greedy = model.generate(sequences[2][None, :20], max_new_tokens=4, do_sample=False)[0]
    sequences.append(greedy)
    counts = [3, 8, 1, len(greedy) - 20]
    options = engine_options(
        ServedModel.open(packed), max_model_len=64, max_num_seqs=2, dtype=torch.float32
    )
    with Engine(options) as engine:
        found = engine.continuation_likelihoods([item.tolist() for item in sequences], counts)
    assert [is_greedy for _, is_greedy in found] == [False, False, False, True]
    for sequence, count, (likelihood, _) in zip(sequences, counts, found, strict=True):
        with torch.no_grad():
            every = model(sequence[None]).logits[0, :-1].double().log_softmax(-1)
        own = every.gather(1, sequence[1:, None])[-count:].sum()
        assert likelihood == pytest.approx(float(own), rel=1e-4)


@pytest.mark.further
def test_an_engine_that_fails_says_why_and_one_that_dies_is_noticed(
    pair: tuple[Path, Path],
) -> None:
    options = engine_options(ServedModel.open(pair[0]), max_model_len=16, dtype=torch.float32)
    with Engine(options) as engine:
        with pytest.raises(ServingError, match=r"vLLM failed: .*16"):
            engine_perplexity(engine, [torch.arange(40)])
        with pytest.raises(ServingError, match="worker died with exit code 1"):
            engine.generate([[1, 2]], 2)
