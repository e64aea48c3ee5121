"""HTTP load: what to put on two servers, and what they made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from sparseserve.errors import RecipeError


@dataclass(frozen=True, slots=True)
class LoadLevel:
    """One level of load.

    Attributes:
        concurrency: Requests under way at once, a new one as soon as one ends; None is no limit.
        request_rate: Requests a second, arriving at random times; None is all at once.
    """

    concurrency: int | None
    request_rate: float | None

    def __str__(self) -> str:
        if self.request_rate is None:
            return f"concurrency {self.concurrency}"
        return f"{self.request_rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to put on each server.

    Attributes:
        levels: One after another.
        input_lengths: Prompt tokens; every length is run at every level.
        output_length: New tokens of each request.
        requests: Number of requests at each level.
        seed: Draws the prompts.
    """

    levels: tuple[LoadLevel, ...]
    input_lengths: tuple[int, ...] = (128,)
    output_length: int = 32
    requests: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecipeError: Names the option and its limit.
        """
        if not self.levels:
            raise RecipeError("--http needs a level of load: give --concurrency or --request-rate")
        if self.requests < 1:
            raise RecipeError(f"--requests {self.requests} must be at least 1")
        for level in self.levels:
            if level.concurrency is not None and not 1 <= level.concurrency <= self.requests:
                raise RecipeError(
                    f"--concurrency {level.concurrency} must be from 1 to the number of requests, "
                    f"{self.requests}: give more --requests"
                )
            if level.request_rate is not None and not (0 < level.request_rate < float("inf")):
                raise RecipeError(
                    f"--request-rate {level.request_rate:g} must be above 0 and finite"
                )

    @property
    def most_at_once(self) -> int:
        """The most requests that can be under way."""
        return max(level.concurrency or self.requests for level in self.levels)

    @property
    def runs(self) -> int:
        """Runs of the client for each server."""
        return len(self.levels) * len(self.input_lengths)


@dataclass(frozen=True, slots=True)
class Load:
    """What the client found at one level; times in milliseconds, as it gives them.

    Attributes:
        requests_per_second: Requests that ended, over the whole run.
        tokens_per_second: New tokens of all requests, over the whole run.
        ttft_ms, p99_ttft_ms: From sending a request to its first token: median, 99th percentile.
        tpot_ms, p99_tpot_ms: Mean time of a request's further tokens.
        itl_ms, p99_itl_ms: Between two tokens that arrived one after another.
    """

    requests_per_second: float
    tokens_per_second: float
    ttft_ms: float
    p99_ttft_ms: float
    tpot_ms: float
    p99_tpot_ms: float
    itl_ms: float
    p99_itl_ms: float

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Self:
        """Read the client's result."""
        keys = {
            "requests_per_second": "request_throughput",
            "tokens_per_second": "output_throughput",
            **{f"{name}_ms": f"median_{name}_ms" for name in ("ttft", "tpot", "itl")},
        }
        names = [field.name for field in fields(cls)]
        return cls(**{name: float(result[keys.get(name, name)]) for name in names})


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One prompt length at one level: what each server made of it."""

    input_length: int
    level: LoadLevel
    model: Load
    baseline: Load

    def to_json(self) -> dict[str, object]:
        """Return JSON data: one row."""
        return {
            "input_length": self.input_length,
            **asdict(self.level),
            "model": asdict(self.model),
            "baseline": asdict(self.baseline),
        }
