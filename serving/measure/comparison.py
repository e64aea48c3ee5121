"""A sparse checkpoint beside its dense baseline: quality, speed and size, through vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.machine import Machine, installed_versions, this_machine
from sparseserve.report import PerplexityResult
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import Engine, EngineOptions, engine_options
from sparseserve.serving.measure.latency import BatchLatency, LatencyPlan, measure_latency
from sparseserve.serving.measure.load import LoadPlan, LoadRow
from sparseserve.serving.measure.load_run import compare_load
from sparseserve.serving.measure.memory import EngineMemory
from sparseserve.serving.measure.perplexity import engine_perplexity, longest_window

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """One checkpoint and what was measured of it."""

    folder: Path
    weight_bytes: int
    options: EngineOptions
    memory: EngineMemory
    perplexity: PerplexityResult
    latency: tuple[BatchLatency, ...]

    def to_json(self) -> dict[str, object]:
        """Return JSON data; latencies are a row for each prompt length and batch size."""
        return {
            "path": str(self.folder),
            "weight_bytes": self.weight_bytes,
            "perplexity": self.perplexity.perplexity,
            "tokens": self.perplexity.tokens,
            "engine": asdict(self.options),
            "memory": self.memory.to_json(),
            "latency": [batch.to_json() for batch in self.latency],
        }


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times as fast as the baseline, medians over paired runs."""

    input_length: int
    batch_size: int
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checkpoint and its baseline, measured in turns on one machine.

    Without a ``load_plan`` nothing was measured over HTTP.
    """

    model: MeasuredModel
    baseline: MeasuredModel
    plan: LatencyPlan
    machine: Machine
    versions: dict[str, str]
    date: str
    load_plan: LoadPlan | None = None
    http: tuple[LoadRow, ...] = ()

    @property
    def speedups(self) -> tuple[Speedup, ...]:
        """Of the model over the baseline, for each prompt length and batch size."""
        pairs = zip(self.model.latency, self.baseline.latency, strict=True)
        return tuple(
            Speedup(
                own.input_length,
                own.batch_size,
                prefill=own.prefill_speedup(base),
                decode=own.decode_speedup(base),
            )
            for own, base in pairs
        )

    def to_json(self) -> dict[str, object]:
        """Return JSON data; what was measured over HTTP, if anything was, under ``http``."""
        data: dict[str, object] = {
            "model": self.model.to_json(),
            "baseline": self.baseline.to_json(),
            "speedups": [asdict(speedup) for speedup in self.speedups],
            "perplexity_ratio": self.model.perplexity.perplexity
            / self.baseline.perplexity.perplexity,
            "weight_bytes_ratio": self.model.weight_bytes / self.baseline.weight_bytes,
            "plan": asdict(self.plan),
            "machine": asdict(self.machine),
            "versions": self.versions,
            "date": self.date,
        }
        if self.load_plan is not None:
            rows = [row.to_json() for row in self.http]
            data["http"] = {"plan": asdict(self.load_plan), "rows": rows}
        return data


def compare(
    folder: Path,
    baseline: Path,
    windows: Sequence[Tensor],
    plan: LatencyPlan,
    *,
    load_plan: LoadPlan | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    on_progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Serve both checkpoints side by side; measure perplexity, latency, memory and size of each.

    Args:
        folder: The sparse checkpoint.
        baseline: What to compare it with, the dense model as a rule.
        windows: Token windows for the perplexity, int64 ``[length]`` each.
        plan: What to run for the latencies.
        load_plan: What to put on two servers, afterwards; None is nothing.
        dtype: Of both engines; None is the checkpoint's where the machine has it, else float32.
        compiled: Whether vLLM compiles both models on a CPU, too.
        on_progress: Told what is going on, and how far it is, as (what, done, total).

    Raises:
        ServingError: One of the two cannot be served, they do not share a vocabulary, or requests
            failed.
        NumericalError: A perplexity is not finite.
        MissingExtraError: vLLM is not installed.
    """
    models = (ServedModel.open(folder), ServedModel.open(baseline))
    if models[0].vocabulary != models[1].vocabulary:
        raise ServingError(
            f"{folder} has {models[0].vocabulary} tokens and the baseline {baseline} has "
            f"{models[1].vocabulary}: give the dense model it was pruned from"
        )
    options = [_options(model, windows, plan, dtype, compiled=compiled) for model in models]
    measured = _measure(models, options, windows, plan, on_progress)
    return Comparison(
        model=measured[0],
        baseline=measured[1],
        plan=plan,
        machine=this_machine(),
        versions=installed_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load_plan=load_plan,
        http=(
            compare_load(*models, load_plan, dtype, on_progress, compiled=compiled)
            if load_plan
            else ()
        ),
    )


def _measure(
    models: tuple[ServedModel, ServedModel],
    options: Sequence[EngineOptions],
    windows: Sequence[Tensor],
    plan: LatencyPlan,
    on_progress: Progress,
) -> list[MeasuredModel]:
    on_progress("starting vLLM", 0, 2)
    with Engine(options[0]) as sparse:
        on_progress("starting vLLM", 1, 2)
        with Engine(options[1]) as dense:
            on_progress("starting vLLM", 2, 2)
            engines = (sparse, dense)
            perplexities = [
                _perplexity(engine, model, windows, on_progress)
                for engine, model in zip(engines, models, strict=True)
            ]
            latencies = _latencies(engines, plan, models[0].vocabulary, on_progress)
    return [
        MeasuredModel(
            model.folder, model.weight_bytes, engine.options, engine.memory, perplexity, latency
        )
        for model, engine, perplexity, latency in zip(
            models, engines, perplexities, latencies, strict=True
        )
    ]


def _options(
    model: ServedModel,
    windows: Sequence[Tensor],
    plan: LatencyPlan,
    dtype: torch.dtype | None,
    *,
    compiled: bool,
) -> EngineOptions:
    generated = max(plan.input_lengths) + plan.output_length
    if model.max_positions is not None and generated > model.max_positions:
        raise ServingError(
            f"{model.folder}: --input-length and --output-length make {generated} tokens, "
            f"the model takes {model.max_positions}: give smaller ones"
        )
    largest = max(plan.batch_sizes)
    return engine_options(
        model,
        max_model_len=max(longest_window(model, windows) + 1, generated),
        max_num_seqs=largest,
        batch_model_len=generated,
        # All prompts of a batch in one step: nothing decodes beside them, so prefill is apart.
        prompt_tokens=max(1024, largest * max(plan.input_lengths)),
        dtype=dtype,
        threads_of_server=True,
        compiled=compiled,
    )


def _perplexity(
    engine: Engine, model: ServedModel, windows: Sequence[Tensor], on_progress: Progress
) -> PerplexityResult:
    what = f"perplexity of {model.folder}"
    on_progress(what, 0, len(windows))
    return engine_perplexity(engine, windows, lambda done, total: on_progress(what, done, total))


def _latencies(
    engines: Sequence[Engine], plan: LatencyPlan, vocabulary: int, on_progress: Progress
) -> list[tuple[BatchLatency, ...]]:
    done, total = 0, plan.runs * len(engines)
    on_progress("latency, in turns", done, total)

    def count() -> None:
        nonlocal done
        done += 1
        on_progress("latency, in turns", done, total)

    return measure_latency(engines, plan, vocabulary, count)
