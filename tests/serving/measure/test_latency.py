from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import RecipeError
from sparseserve.serving.measure.engine import Generation
from sparseserve.serving.measure.latency import (
    BatchLatency,
    LatencyPlan,
    LatencySample,
    Spread,
    Steps,
    latency_sample,
    measure_latency,
)


@dataclass
class ClockworkEngine:
    """Takes ``step`` seconds for a prefill and for each further token, times the run's number."""

    name: str
    step: float
    order: list[str]
    prompts: list[Sequence[Sequence[int]]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        self.order.append(self.name)
        self.prompts.append(prompts)
        step = self.step * len(self.prompts)
        tokens = tuple((0,) * new_tokens for _ in prompts)
        return Generation(
            tokens,
            first_token_seconds=step,
            step_seconds=(step,) * (new_tokens - 1),
            total_seconds=step * new_tokens,
        )


def measured(plan: LatencyPlan) -> tuple[list[tuple[BatchLatency, ...]], list[ClockworkEngine]]:
    order: list[str] = []
    engines = [ClockworkEngine("sparse", 1.0, order), ClockworkEngine("dense", 1.5, order)]
    return measure_latency(engines, plan, vocabulary=50), engines


def test_engines_take_turns_and_swap_places_in_every_repeat() -> None:
    _, engines = measured(LatencyPlan(batch_sizes=(1,), repeats=3))
    assert engines[0].order == ["sparse", "dense", "dense", "sparse"] * 2


def test_engines_get_the_same_prompts_of_the_length_and_number_asked_for() -> None:
    _, engines = measured(LatencyPlan(batch_sizes=(1, 3), input_lengths=(7,), repeats=2))
    assert engines[0].prompts == engines[1].prompts
    shapes = [[len(prompt) for prompt in prompts] for prompts in engines[0].prompts]
    assert shapes == [[7]] * 3 + [[7, 7, 7]] * 3
    assert all(0 <= token < 50 for token in engines[0].prompts[-1][2])


def test_the_same_seed_gives_the_same_prompts_and_another_does_not() -> None:
    prompts = [measured(LatencyPlan(repeats=1, seed=seed))[1][0].prompts for seed in (0, 0, 1)]
    assert prompts[0] == prompts[1] != prompts[2]


def test_the_first_run_of_a_batch_size_is_not_counted() -> None:
    (sparse, _), _ = measured(LatencyPlan(batch_sizes=(1, 2), output_length=4, repeats=3))
    assert [sample.ttft_seconds for sample in sparse[0].samples] == [2.0, 3.0, 4.0]
    assert [sample.tpot_seconds for sample in sparse[1].samples] == [6.0, 7.0, 8.0]


def test_speedups_are_ratios_of_paired_runs() -> None:
    (sparse, dense), _ = measured(LatencyPlan(batch_sizes=(1,), repeats=4))
    # Every run is slower than the one before, so only pairs made at the same time agree on 1.5.
    assert sparse[0].decode_speedup(dense[0]) == pytest.approx(1.5)
    assert sparse[0].prefill_speedup(dense[0]) == pytest.approx(1.5)
    assert dense[0].decode_speedup(sparse[0]) == pytest.approx(1 / 1.5)


def test_every_prompt_length_is_run_at_every_batch_size() -> None:
    plan = LatencyPlan(batch_sizes=(1, 2), input_lengths=(3, 5), repeats=1)
    (sparse, dense), engines = measured(plan)
    assert [(row.input_length, row.batch_size) for row in sparse] == [
        (3, 1),
        (3, 2),
        (5, 1),
        (5, 2),
    ]
    assert [(len(prompts[0]), len(prompts)) for prompts in engines[0].prompts[::2]] == [
        (row.input_length, row.batch_size) for row in dense
    ]
    assert len(engines[0].prompts) == plan.runs


def test_one_run_tells_prefill_and_decoding_apart() -> None:
    run = Generation(
        ((1, 2, 3, 4, 5),) * 3,
        first_token_seconds=2.0,
        step_seconds=(1.0, 1.0, 1.0, 5.0),
        total_seconds=10.0,
    )
    assert latency_sample(run, input_length=8) == LatencySample(
        ttft_seconds=2.0,
        tpot_seconds=2.0,
        step_seconds=(1.0, 1.0, 1.0, 5.0),
        prefill_tokens_per_second=12.0,
        tokens_per_second=1.5,
    )


def test_inter_token_latencies_are_of_all_steps_of_all_runs() -> None:
    (sparse, _), _ = measured(LatencyPlan(batch_sizes=(1,), output_length=4, repeats=3))
    # Three runs after the warm-up, three steps each: 2, 3 and 4 seconds.
    assert sparse[0].itl_seconds == Steps(median=3.0, p99=4.0)


def test_one_slow_step_in_a_hundred_shows_in_the_tail_and_not_in_the_median() -> None:
    found = Steps.of([1.0] * 99 + [100.0] * 2)
    assert (found.median, found.p99) == (1.0, 100.0)
    assert Steps.of([3.0]) == Steps(median=3.0, p99=3.0)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_a_spread_is_ordered_and_within_its_values(values: list[float]) -> None:
    spread = Spread.of(values)
    quartiles = [min(values), spread.lower_quartile, spread.median, spread.upper_quartile]
    assert sorted(quartiles) == pytest.approx(quartiles)
    assert spread.upper_quartile <= max(values) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("option", "plan"),
    [
        ("--input-length", {"input_lengths": (8, 0)}),
        ("--input-length", {"input_lengths": ()}),
        ("--output-length", {"output_length": 1}),
        ("--repeats", {"repeats": 0}),
        ("--batch-sizes", {"batch_sizes": ()}),
        ("--batch-sizes", {"batch_sizes": (4, 0)}),
    ],
)
def test_a_plan_that_measures_nothing_is_refused(option: str, plan: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=option):
        LatencyPlan(**plan)  # type: ignore[arg-type]
