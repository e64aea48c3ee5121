"""What the demo ends with: in words, what 2:4 cost and gained, from the file of ``bench``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Medians of a few runs on a shared machine do not tell smaller differences apart.
NOTICEABLE = 0.05
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity of the dense model and of the 2:4 model; less is better."""

    dense: float
    sparse: float

    @property
    def faster(self) -> bool:
        """Whether the 2:4 model needs noticeably less."""
        return self.sparse < self.dense / (1 + NOTICEABLE)

    @property
    def saved(self) -> str:
        """The change as a share of the dense model's."""
        percent = round(100 * (self.sparse / self.dense - 1))
        return f"{abs(percent)} % {'less' if percent < 0 else 'more'}" if percent else "the same"


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to the first token (TTFT) and between tokens (TPOT) for some prompts at once."""

    prompts: int
    input_length: int
    ttft: Pair
    tpot: Pair


@dataclass(frozen=True, slots=True)
class Findings:
    """What a run of ``sparseserve bench`` found; sizes in bytes."""

    processor: str
    perplexity: Pair
    disk: Pair
    memory: Pair
    speeds: tuple[Speed, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Findings:
        """Read the file that ``sparseserve bench --output`` writes."""
        base, own = data["baseline"], data["model"]
        return cls(
            processor=data["machine"]["gpu"] or data["machine"]["cpu"],
            perplexity=Pair(base["perplexity"], own["perplexity"]),
            disk=Pair(base["weight_bytes"], own["weight_bytes"]),
            memory=Pair(base["memory"]["weight_bytes"], own["memory"]["weight_bytes"]),
            speeds=tuple(
                Speed(
                    row["batch_size"],
                    row["input_length"],
                    ttft=_medians(other, row, "ttft_seconds"),
                    tpot=_medians(other, row, "tpot_seconds"),
                )
                for other, row in zip(base["latency"], own["latency"], strict=True)
            ),
        )


def verdict(found: Findings, checkpoint: Path, bench: Path) -> str:
    """Say what was lost and gained, where the files are, and what to do next.

    Args:
        found: What was measured.
        checkpoint: The folder of the 2:4 model.
        bench: The file that ``found`` was read from.
    """
    return "\n".join(
        [
            "What was lost",
            f"  Perplexity is {found.perplexity.sparse:,.1f}, that of the dense model "
            f"{found.perplexity.dense:,.1f} (lower is better).",
            "What was gained",
            f"  {_size('on disk', found.disk)}",
            f"  {_size('in memory', found.memory)}",
            "How fast it is here",
            f"  {_sum_up(found)}",
            *(f"  {line}" for speed in _ends(found.speeds) for line in _speed(speed)),
            "Where it is",
            f"  {checkpoint}: the 2:4 model",
            f"  {bench}: all that was measured",
            "What to do next",
            f"  sparseserve serve {checkpoint}",
        ]
    )


def _size(where: str, size: Pair) -> str:
    return (
        f"Weights {where}: {size.sparse / MIB:,.0f} MiB, dense {size.dense / MIB:,.0f} MiB "
        f"({size.saved})."
    )


def _speed(speed: Speed) -> list[str]:
    at_once = _prompts([speed.prompts])
    return [
        f"{name}, {at_once} of {speed.input_length} tokens: {pair.sparse * 1000:,.1f} ms, "
        f"dense {pair.dense * 1000:,.1f} ms ({pair.saved})."
        for name, pair in (
            ("Time to first token (TTFT)", speed.ttft),
            ("Time per output token (TPOT)", speed.tpot),
        )
    ]


def _ends(speeds: Sequence[Speed]) -> list[Speed]:
    """Return the first and the last; the file has all."""
    return list(dict.fromkeys((speeds[0], speeds[-1])))


def _sum_up(found: Findings) -> str:
    """Say where the 2:4 model is faster, and where it is not."""
    where = f"on this processor ({found.processor})"
    to_first = [(each.prompts, each.ttft.faster) for each in found.speeds]
    per_token = [(each.prompts, each.tpot.faster) for each in found.speeds]
    faster, not_faster = (
        [
            f"{what} with {_prompts(prompts)}"
            for what, kind in (("to the first token", to_first), ("per output token", per_token))
            if (prompts := [count for count, is_faster in kind if is_faster == wanted])
        ]
        for wanted in (True, False)
    )
    if not faster:
        return f"The 2:4 model is not faster than the dense one {where}."
    if not not_faster:
        return f"The 2:4 model is faster than the dense one {where}."
    return (
        f"The 2:4 model is faster {where}: {' and '.join(faster)}. "
        f"It is not faster {' and '.join(not_faster)}."
    )


def _prompts(counts: Iterable[int]) -> str:
    numbers = list(dict.fromkeys(counts))
    *first, last = map(str, numbers)
    words = f"{', '.join(first)} and {last}" if first else last
    return f"{words} prompt{'' if numbers == [1] else 's'} at once"


def _medians(base: dict[str, Any], own: dict[str, Any], key: str) -> Pair:
    return Pair(base[key]["median"], own[key]["median"])
