"""What an engine finds, and what becomes of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparseserve.errors import ServingError
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, engine_options
from sparseserve.serving.measure.perplexity import engine_perplexity
from sparseserve.testing import save_tiny_model

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


@pytest.fixture
def large_states(tmp_path: Path) -> ServedModel:
    """A model whose Mamba mixers keep more of a sequence than attention does."""
    folder = save_tiny_model("granitemoehybrid", tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.mamba_d_state = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ServedModel.open(folder)


def test_the_cache_of_a_batch_holds_the_states_of_mamba_mixers(large_states: ServedModel) -> None:
    options = engine_options(
        large_states, max_model_len=32, max_num_seqs=4, dtype=torch.float32, prompt_tokens=64
    )
    with Engine(options) as engine:
        found = engine.generate([[number] * 16 for number in range(4)], 8)
    assert len(found.step_seconds) == 7
    state_bytes = 4 * 2 * 32 * 4096
    assert engine.memory.cache_bytes > options.kv_cache_memory_bytes + 4 * state_bytes


def test_a_batch_that_does_not_run_at_once_is_not_timed(pair: tuple[Path, Path]) -> None:
    options = engine_options(ServedModel.open(pair[0]), max_model_len=16, dtype=torch.float32)
    with (
        Engine(options) as engine,
        pytest.raises(ServingError, match="2 prompts did not run at once: give smaller --batch"),
    ):
        engine.generate([[1, 2], [3, 4]], 4)


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
