"""Latency and throughput of engines, measured in turns.

One run gives a batch of prompts at once. *Time to first token* (TTFT) is the time until every
prompt of the batch has its first new token; *time per output token* (TPOT) is the rest of the
run over the steps in it. The engines take turns within every repeat, first one first, then the
other way round, so that a drift of the machine meets both alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparseserve.errors import RecipeError
from sparseserve.serving.engine import Generation


class GeneratingEngine(Protocol):
    """What is measured."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue all ``prompts`` as one batch."""


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """What to run.

    Attributes:
        batch_sizes: Prompts at once.
        input_length: Tokens of each prompt.
        output_length: New tokens of each prompt.
        repeats: Measured runs of each batch size, after one that is not.
        seed: Draws the prompts.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    input_length: int = 128
    output_length: int = 32
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecipeError: Names the option and its limit.
        """
        smallest = {
            "--input-length": (self.input_length, 1),
            "--output-length": (self.output_length, 2),
            "--repeats": (self.repeats, 1),
            "--batch-sizes": (min(self.batch_sizes, default=0), 1),
        }
        for option, (value, least) in smallest.items():
            if value < least:
                raise RecipeError(f"{option} {value} must be at least {least}")

    @property
    def runs(self) -> int:
        """Runs of each engine."""
        return len(self.batch_sizes) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class LatencySample:
    """One run: seconds to the first token, seconds a token after it, new tokens a second."""

    ttft_seconds: float
    tpot_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of repeated runs."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise ``values``, of which there is at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """The measured runs of one engine at one batch size, in the order they were made."""

    batch_size: int
    samples: tuple[LatencySample, ...]

    @property
    def ttft_seconds(self) -> Spread:
        """Seconds to the first token of all prompts."""
        return Spread.of([sample.ttft_seconds for sample in self.samples])

    @property
    def tpot_seconds(self) -> Spread:
        """Seconds a decoding step."""
        return Spread.of([sample.tpot_seconds for sample in self.samples])

    @property
    def tokens_per_second(self) -> Spread:
        """New tokens a second, of all prompts together, first tokens included."""
        return Spread.of([sample.tokens_per_second for sample in self.samples])

    def prefill_speedup(self, baseline: BatchLatency) -> float:
        """Return the median, over paired runs, of the baseline's TTFT over this one's."""
        pairs = zip(baseline.samples, self.samples, strict=True)
        return statistics.median(base.ttft_seconds / own.ttft_seconds for base, own in pairs)

    def decode_speedup(self, baseline: BatchLatency) -> float:
        """Return the median, over paired runs, of the baseline's TPOT over this one's."""
        pairs = zip(baseline.samples, self.samples, strict=True)
        return statistics.median(base.tpot_seconds / own.tpot_seconds for base, own in pairs)


def measure_latency(
    engines: Sequence[GeneratingEngine],
    plan: LatencyPlan,
    vocabulary: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[tuple[BatchLatency, ...]]:
    """Measure ``engines`` in turns; return, for each, one entry a batch size.

    Args:
        engines: To compare; all get the same prompts.
        plan: What to run.
        vocabulary: Prompts are random token ids below this.
        on_run: Told after every run.

    Raises:
        ServingError: An engine failed.
    """
    generator = random.Random(plan.seed)
    results: list[list[BatchLatency]] = [[] for _ in engines]
    for size in plan.batch_sizes:
        prompts = [
            [generator.randrange(vocabulary) for _ in range(plan.input_length)] for _ in range(size)
        ]
        samples: list[list[LatencySample]] = [[] for _ in engines]
        for repeat in range(plan.repeats + 1):
            turns = list(enumerate(engines))
            for index, engine in turns if repeat % 2 == 0 else reversed(turns):
                samples[index].append(latency_sample(engine.generate(prompts, plan.output_length)))
                on_run()
        for result, all_samples in zip(results, samples, strict=True):
            # The first run warms up: memory, kernels of this batch size.
            result.append(BatchLatency(size, tuple(all_samples[1:])))
    return [tuple(result) for result in results]


def latency_sample(run: Generation) -> LatencySample:
    """Turn the times of one run into rates."""
    new_tokens = len(run.tokens[0])
    return LatencySample(
        ttft_seconds=run.first_token_seconds,
        tpot_seconds=(run.total_seconds - run.first_token_seconds) / (new_tokens - 1),
        tokens_per_second=len(run.tokens) * new_tokens / run.total_seconds,
    )
