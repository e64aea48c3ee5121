"""Which kernels are chosen from recorded times."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.choice.plan import (
    BATCHES,
    Choice,
    KernelPlan,
    KernelTimes,
    PlanStep,
    choose,
    parse_plan,
)

DENSE_BYTES = 1000


def recorded(kernel: str, layout: str, size: int, seconds: dict[int, float] | float) -> KernelTimes:
    times = seconds if isinstance(seconds, dict) else dict.fromkeys(BATCHES, seconds)
    return KernelTimes(kernel, layout, size, times)


def small_then_large(small: float, large: float) -> dict[int, float]:
    return {batch: small if batch <= 8 else large for batch in BATCHES}


DENSE = recorded("dense", "dense", 1000, 1.0)


def test_the_fastest_kernel_of_each_batch_size_runs_it() -> None:
    chosen = choose(
        [
            recorded("direct", "tiles", 562, {1: 0.4, 2: 0.8}),
            recorded("unpack", "tiles", 562, 0.9),
            DENSE,
        ],
        DENSE_BYTES,
    )
    assert chosen.layouts == ("tiles",)
    assert [chosen.by_batch[batch] for batch in (1, 2, 4, 512)] == ["direct"] * 2 + ["unpack"] * 2


def test_dense_is_kept_where_no_sparse_kernel_gains() -> None:
    chosen = choose([recorded("sparse", "tiles", 562, 1.3), DENSE], DENSE_BYTES)
    assert set(chosen.by_batch.values()) == {"dense"}
    assert chosen.layouts == ("dense",)


def test_a_loss_within_the_noise_costs_less_than_memory() -> None:
    chosen = choose([recorded("sparse", "tiles", 562, 1.04), DENSE], DENSE_BYTES)
    assert chosen.layouts == ("tiles",)


def test_two_packed_copies_are_kept_if_together_they_are_little_more_than_the_dense_weight() -> (
    None
):
    decode = recorded("decode", "packed24", 562, small_then_large(0.6, 2.0))
    prefill = recorded("prefill", "compressed", 562, small_then_large(2.0, 0.6))
    chosen = choose([decode, prefill, DENSE], DENSE_BYTES)
    assert set(chosen.layouts) == {"packed24", "compressed"}
    assert chosen.by_batch[8] == "decode"
    assert chosen.by_batch[16] == "prefill"


def test_a_packed_copy_beside_the_dense_weight_is_too_much() -> None:
    decode = recorded("decode", "packed24", 562, small_then_large(0.6, 1.2))
    assert len(choose([decode, DENSE], DENSE_BYTES).layouts) == 1


def test_a_layout_that_does_not_run_every_batch_size_is_not_kept_alone() -> None:
    chosen = choose([recorded("direct", "tiles", 562, {1: 0.1}), DENSE], DENSE_BYTES)
    assert chosen.layouts == ("dense",)


def test_without_a_kernel_for_every_batch_size_there_is_no_choice() -> None:
    with pytest.raises(ServingError, match="no kernel runs every batch size: tiles"):
        choose([recorded("direct", "tiles", 562, {1: 0.1})], DENSE_BYTES)
    with pytest.raises(ServingError, match="no kernel runs every batch size: none at all"):
        choose([], DENSE_BYTES)


def test_a_packed_form_far_larger_than_the_dense_weight_is_no_choice() -> None:
    with pytest.raises(ServingError, match=r"fits 1\.25 times the dense weight: tiles"):
        choose([recorded("large", "tiles", 2000, 0.1)], DENSE_BYTES)


SECONDS = st.floats(0.01, 100)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.fixed_dictionaries(dict.fromkeys(BATCHES, SECONDS))),
        max_size=4,
    )
)
def test_no_other_affordable_set_of_layouts_loses_less(
    found: list[tuple[str, dict[int, float]]],
) -> None:
    times = [DENSE] + [
        recorded(f"{layout}{number}", layout, 500, seconds)
        for number, (layout, seconds) in enumerate(found)
    ]
    fastest = {batch: min(kernel.seconds[batch] for kernel in times) for batch in BATCHES}

    def loss(layouts: tuple[str, ...]) -> float:
        total = 0.0
        for batch in BATCHES:
            own = min(kernel.seconds[batch] for kernel in times if kernel.layout in layouts)
            total += math.log(own / fastest[batch]) if own > 1.05 * fastest[batch] else 0
        return total

    packed = sorted({layout for layout, _ in found})
    affordable = [("dense",), *((one,) for one in packed), *combinations(packed, 2)]
    chosen = choose(times, DENSE_BYTES)
    assert set(chosen.layouts) <= {"dense"} or "dense" not in chosen.layouts
    assert loss(chosen.layouts) == pytest.approx(min(map(loss, affordable)))
    for batch, kernel in chosen.by_batch.items():
        own = next(times_ for times_ in times if times_.kernel == kernel)
        assert own.layout in chosen.layouts
        rest = [other.seconds[batch] for other in times if other.layout in chosen.layouts]
        assert own.seconds[batch] == min(rest)


def test_a_plan_knows_where_the_tensors_of_each_kernel_lie() -> None:
    by_batch = {batch: "decode" if batch <= 8 else "prefill" for batch in BATCHES}
    plan = Choice(by_batch, ("packed24", "compressed")).plan(
        {"decode": "packed24", "prefill": "compressed"}, {"packed24": 2, "compressed": 1}
    )
    assert plan.steps == (PlanStep("decode", 0, 2, 8), PlanStep("prefill", 2, 3, 0))
    assert plan.describe() == "decode up to batch 8, then prefill"


@pytest.mark.parametrize(
    ("batch", "kernel"), [(1, "a"), (4, "a"), (5, "b"), (64, "b"), (9999, "c")]
)
def test_a_batch_runs_as_the_next_larger_measured_one(batch: int, kernel: str) -> None:
    plan = KernelPlan((PlanStep("a", 0, 1, 4), PlanStep("b", 0, 1, 64), PlanStep("c", 1, 2, 0)))
    assert plan.step(batch).kernel == kernel
    assert parse_plan(str(plan)) == plan
