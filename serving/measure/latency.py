"""Latency and throughput of engines, measured in turns.

One run gives a batch of prompts at once. Its first part, *prefill*, ends when every prompt of the
batch has its first new token; that moment is the *time to first token* (TTFT). The rest is
*decoding*: in each step every prompt gets one more token. *Inter-token latencies* (ITL) are the
times of the single steps, *time per output token* (TPOT) is their mean in one run. The engines
take turns within every repeat, first one first, then the other way round, so that a drift of the
machine meets both alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Protocol

from sparseserve.errors import RecipeError
from sparseserve.serving.measure.engine import Generation


class GeneratingEngine(Protocol):
    """What is measured."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue all ``prompts`` as one batch."""


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """What to run.

    Attributes:
        batch_sizes: Prompts at once.
        input_lengths: Tokens of each prompt; every length is run at every batch size.
        output_length: New tokens of each prompt.
        repeats: Measured runs of each length and batch size, after one that is not.
        seed: Draws the prompts.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    input_lengths: tuple[int, ...] = (128,)
    output_length: int = 32
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecipeError: Names the option and its limit.
        """
        smallest = {
            "--input-length": (min(self.input_lengths, default=0), 1),
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
        return len(self.input_lengths) * len(self.batch_sizes) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class LatencySample:
    """One run.

    Attributes:
        ttft_seconds: Until all prompts had their first token.
        tpot_seconds: Mean of the steps after it.
        step_seconds: Each of them.
        prefill_tokens_per_second: Prompt tokens, of all prompts, over the time to first token.
        tokens_per_second: New tokens, of all prompts, over the whole run.
    """

    ttft_seconds: float
    tpot_seconds: float
    step_seconds: tuple[float, ...]
    prefill_tokens_per_second: float
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
class Steps:
    """Median and 99th percentile of single steps: how long a token takes, and the slowest ones."""

    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Steps:
        """Summarise ``values``, of which there is at least one."""
        if len(values) == 1:
            return cls(values[0], values[0])
        return cls(
            statistics.median(values), statistics.quantiles(values, n=100, method="inclusive")[98]
        )


@dataclass(frozen=True, slots=True)
class BatchLatency:
    """One engine's measured runs of one prompt length and batch size, in the order of making."""

    input_length: int
    batch_size: int
    samples: tuple[LatencySample, ...]

    @property
    def ttft_seconds(self) -> Spread:
        """Seconds to the first token of all prompts."""
        return Spread.of([sample.ttft_seconds for sample in self.samples])

    @property
    def tpot_seconds(self) -> Spread:
        """Mean seconds of a decoding step."""
        return Spread.of([sample.tpot_seconds for sample in self.samples])

    @property
    def itl_seconds(self) -> Steps:
        """Seconds of single decoding steps, over all runs."""
        return Steps.of([step for sample in self.samples for step in sample.step_seconds])

    @property
    def prefill_tokens_per_second(self) -> Spread:
        """Prompt tokens a second, of all prompts together."""
        return Spread.of([sample.prefill_tokens_per_second for sample in self.samples])

    @property
    def tokens_per_second(self) -> Spread:
        """New tokens a second, of all prompts together, first tokens included."""
        return Spread.of([sample.tokens_per_second for sample in self.samples])

    def to_json(self) -> dict[str, object]:
        """Return JSON data: one row, in which runs are median and quartiles."""
        return {
            "input_length": self.input_length,
            "batch_size": self.batch_size,
            "ttft_seconds": asdict(self.ttft_seconds),
            "prefill_tokens_per_second": asdict(self.prefill_tokens_per_second),
            "tpot_seconds": asdict(self.tpot_seconds),
            "itl_seconds": asdict(self.itl_seconds),
            "tokens_per_second": asdict(self.tokens_per_second),
        }

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
    """Measure ``engines`` in turns; return, for each, one entry a length and batch size.

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
    for length, size in product(plan.input_lengths, plan.batch_sizes):
        prompts = [[generator.randrange(vocabulary) for _ in range(length)] for _ in range(size)]
        samples: list[list[LatencySample]] = [[] for _ in engines]
        for repeat in range(plan.repeats + 1):
            turns = list(enumerate(engines))
            for index, engine in turns if repeat % 2 == 0 else reversed(turns):
                run = engine.generate(prompts, plan.output_length)
                samples[index].append(latency_sample(run, length))
                on_run()
        for result, all_samples in zip(results, samples, strict=True):
            # The first run warms up: memory, kernels of this batch size.
            result.append(BatchLatency(length, size, tuple(all_samples[1:])))
    return [tuple(result) for result in results]


def latency_sample(run: Generation, input_length: int) -> LatencySample:
    """Turn the times of one run of prompts of ``input_length`` tokens into rates."""
    prompts, new_tokens = len(run.tokens), len(run.tokens[0])
    return LatencySample(
        ttft_seconds=run.first_token_seconds,
        tpot_seconds=(run.total_seconds - run.first_token_seconds) / (new_tokens - 1),
        step_seconds=run.step_seconds,
        prefill_tokens_per_second=prompts * input_length / run.first_token_seconds,
        tokens_per_second=prompts * new_tokens / run.total_seconds,
    )
