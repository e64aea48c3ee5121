"""Which kernel runs which batch of a layer, decided from measured times.

A batch is the number of tokens multiplied at once: the sequences that are decoded together, or a
prompt. Kernels are timed at the sizes :data:`BATCHES`; any other runs as the next larger of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.protocol import LinearKernel

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)

# A second packed copy must be worth it: differences below this share are noise, or not worth it.
_TOLERANCE = 1.05
# Copies of one layer may take this much of the dense weight: two packed ones, not packed and dense.
_LARGEST_SHARE = 1.25


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """What one kernel takes for one layer.

    Attributes:
        kernel: Its name.
        layout: The packed form it multiplies with.
        packed_bytes: Size of that form.
        seconds: Median of each batch size of :data:`BATCHES` that it takes.
    """

    kernel: str
    layout: str
    packed_bytes: int
    seconds: dict[int, float]

    def fits(self, kernel: LinearKernel) -> bool:
        """Whether these can be times of ``kernel``: of its layout, and its batch sizes."""
        return kernel.layout == self.layout and set(self.seconds) == set(batches_of(kernel))


def batches_of(kernel: LinearKernel) -> tuple[int, ...]:
    """Return the batch sizes that ``kernel`` takes."""
    return tuple(b for b in BATCHES if kernel.largest_batch is None or b <= kernel.largest_batch)


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One kernel of a plan, and the place of its tensors among all that the layer keeps.

    Attributes:
        kernel: Its name.
        first: Where its tensors start.
        stop: Where they end.
        largest_batch: It runs batches up to this size that no step before runs; 0 is any.
    """

    kernel: str
    first: int
    stop: int
    largest_batch: int


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """Which kernel runs which batch of one layer. As text it can be an operator's argument."""

    steps: tuple[PlanStep, ...]

    def __str__(self) -> str:
        """Write it so that :func:`parse_plan` reads it."""
        return ";".join(
            f"{step.kernel},{step.first},{step.stop},{step.largest_batch}" for step in self.steps
        )

    def step(self, batch: int) -> PlanStep:
        """Return the step that runs ``batch`` tokens."""
        for step in self.steps:  # a few: this runs in every product
            if batch <= step.largest_batch:
                return step
        return self.steps[-1]

    def describe(self) -> str:
        """Say it in words, for a log."""
        parts = [
            f"{step.kernel} up to batch {step.largest_batch}" if step.largest_batch else step.kernel
            for step in self.steps
        ]
        return ", then ".join(parts)


@cache
def parse_plan(text: str) -> KernelPlan:
    """Read what ``str`` made of a plan."""
    steps = []
    for part in text.split(";"):
        kernel, first, stop, largest = part.split(",")
        steps.append(PlanStep(kernel, int(first), int(stop), int(largest)))
    return KernelPlan(tuple(steps))


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest kernels by batch size, and the layouts they need, in the order they are kept."""

    by_batch: dict[int, str]
    layouts: tuple[str, ...]

    def plan(self, kernels: dict[str, str], counts: dict[str, int]) -> KernelPlan:
        """Return the plan, given each kernel's layout and each layout's number of tensors."""
        starts = {
            layout: sum(counts[other] for other in self.layouts[:place])
            for place, layout in enumerate(self.layouts)
        }
        steps: list[PlanStep] = []
        for batch, kernel in self.by_batch.items():
            first = starts[kernels[kernel]]
            if steps and steps[-1].kernel == kernel:
                steps.pop()
            steps.append(PlanStep(kernel, first, first + counts[kernels[kernel]], batch))
        last = steps.pop()
        steps.append(PlanStep(last.kernel, last.first, last.stop, 0))
        return KernelPlan(tuple(steps))


def choose(times: Sequence[KernelTimes], dense_bytes: int) -> Choice:
    """Return the kernels to run a layer with.

    Of all sets of layouts that together take at most 1.25 times the dense weight, that one is kept
    which loses least against the fastest kernel of all, over all batch sizes (a loss below 5 %
    counts as none, more is added up in logarithms); among equals, the one of the fewest bytes.

    Args:
        times: Of every kernel that can run the layer; together they take every batch size.
        dense_bytes: Size of the dense weight in the layer's dtype.

    Raises:
        ServingError: No layout, or none that fits the memory, runs every batch size.
    """
    sizes = {found.layout: found.packed_bytes for found in times}
    if not _covers(times):
        raise ServingError(f"no kernel runs every batch size: {', '.join(sizes) or 'none at all'}")
    best = {batch: min(_seconds(times, batch).values()) for batch in BATCHES}
    options = []
    for count in (1, 2):
        for layouts in combinations(sizes, count):
            chosen = [found for found in times if found.layout in layouts]
            taken = sum(sizes[layout] for layout in layouts)
            if taken > _LARGEST_SHARE * dense_bytes or not _covers(chosen):
                continue
            loss = 0.0
            for batch in BATCHES:
                slower = min(_seconds(chosen, batch).values()) / best[batch]
                loss += math.log(slower) if slower > _TOLERANCE else 0.0
            options.append((loss, taken, layouts, chosen))
    if not options:
        raise ServingError(f"no packed form fits 1.25 times the dense weight: {', '.join(sizes)}")
    _, _, layouts, chosen = min(options, key=lambda option: option[:2])
    by_batch = {batch: _fastest(_seconds(chosen, batch)) for batch in BATCHES}
    needed = {found.layout for found in chosen if found.kernel in by_batch.values()}
    return Choice(by_batch, tuple(layout for layout in layouts if layout in needed))


def _covers(times: Sequence[KernelTimes]) -> bool:
    return all(_seconds(times, batch) for batch in BATCHES)


def _seconds(times: Sequence[KernelTimes], batch: int) -> dict[str, float]:
    return {found.kernel: found.seconds[batch] for found in times if batch in found.seconds}


def _fastest(seconds: dict[str, float]) -> str:
    return min(seconds, key=lambda kernel: seconds[kernel])
