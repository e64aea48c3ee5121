"""Scores of a checkpoint of any format on the tasks of EleutherAI's lm-eval."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparseserve.checkpoint.verification import check_before_reading
from sparseserve.devices import dtype_name, evaluation_dtype
from sparseserve.errors import RecipeError, first_line
from sparseserve.evaluation.evaluate import Backend, check_evaluated_folder
from sparseserve.evaluation.task_data import TaskChoice, choose_tasks
from sparseserve.evaluation.task_models import task_model
from sparseserve.huggingface.opening import open_config
from sparseserve.machine import this_machine
from sparseserve.models.model_folder import find_model_folder
from sparseserve.text import TextFile

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """Which tasks to run, and how.

    Attributes:
        tasks: Names of lm-eval's tasks, groups or tags.
        folder: Local data sets, as ``--tasks-from`` takes them; None is the hub.
        limit: Items of each task, the first ones; None takes all.
        batch_size: Answers that are computed at once.
        backend: Which engine runs the model.
        dtype: Floating type to compute in; None is as for perplexity.
        device: Where transformers runs the model; None is a CUDA device if there is one.
        verify: Whether to verify the checkpoint, which must be ours, before it is evaluated.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    backend: Backend = "transformers"
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--limit", self.limit), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise RecipeError(f"{option} {value} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Its name.
        version: Of its definition, by lm-eval.
        shots: Examples before each question.
        metric: Its name, with the filter of answers where the task has one.
        value: The score.
        standard_error: Of the score, by lm-eval; None where it gives none.
        items: How many items were asked; None for a group of tasks.
        items_digest: SHA-256 over the items, to tell whether two scores are of the same.
        values: Of each item, in their order, where ``value`` is their mean; else empty.
    """

    task: str
    version: str
    shots: int
    metric: str
    value: float
    standard_error: float | None
    items: int | None
    items_digest: str
    values: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """Scores and all that they depend on; ``files`` are the local data sets."""

    scores: tuple[TaskScore, ...]
    model: str
    backend: Backend
    dtype: str
    harness: str
    limit: int | None
    batch_size: int
    files: tuple[TextFile, ...]
    seconds: float
    verified: bool


def evaluate_tasks(source: str, spec: TaskSpec) -> TaskReport:
    """Score the model ``source``, a folder of any format or a hub name.

    All seeds are those of lm-eval's own command, so that its scores are the same.

    Raises:
        MissingExtraError: lm-eval, or vLLM, is not installed.
        SparseServeError: The model cannot be loaded, or a task or its data cannot be had.
    """
    folder = find_model_folder(source)
    check_before_reading(folder, verified=spec.verify)
    check_evaluated_folder(folder)
    dtype = spec.dtype or evaluation_dtype(open_config(folder).dtype, this_machine())
    with tempfile.TemporaryDirectory(prefix="sparseserve-tasks-") as scratch:
        chosen = choose_tasks(spec.tasks, spec.folder, Path(scratch))
        require_kinds(spec.backend, chosen)
        start = time.perf_counter()
        found = _run(folder, spec, dtype, chosen)
        seconds = time.perf_counter() - start
    return TaskReport(
        scores=tuple(_scores(found)),
        model=source,
        backend=spec.backend,
        dtype=dtype_name(dtype),
        harness=f"lm-eval {metadata.version('lm-eval')}",
        limit=spec.limit,
        batch_size=spec.batch_size,
        files=chosen.files,
        seconds=seconds,
        verified=spec.verify,
    )


def require_kinds(backend: Backend, chosen: TaskChoice) -> None:
    """Refuse tasks that a backend cannot run, before it is started.

    Raises:
        RecipeError: Names the task and the remedy.
    """
    if backend != "vllm":
        return
    from sparseserve.evaluation.engine_model import KINDS  # noqa: PLC0415  # needs lm-eval

    for task, kind in chosen.kinds.items():
        if kind not in KINDS:
            raise RecipeError(
                f"--tasks {task} is of the kind {kind}, and --backend vllm scores "
                f"{' and '.join(sorted(KINDS))} only: give --backend transformers"
            )


def _run(folder: Path, spec: TaskSpec, dtype: torch.dtype, chosen: TaskChoice) -> dict[str, Any]:
    from lm_eval import simple_evaluate  # noqa: PLC0415  # optional, and takes seconds

    with task_model(
        folder, spec.backend, dtype=dtype, device=spec.device, batch_size=spec.batch_size
    ) as model:
        try:
            found: dict[str, Any] = simple_evaluate(
                model,
                tasks=list(chosen.specs),
                task_manager=chosen.manager,
                limit=spec.limit,
            )
        except ValueError as error:  # tasks that run code, or show pictures
            raise RecipeError(
                f"--tasks {','.join(spec.tasks)}: lm-eval does not run them: {first_line(error)}"
            ) from error
    return found


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, results in found["results"].items():
        samples = sorted(found["samples"].get(task, ()), key=lambda sample: int(sample["doc_id"]))
        for key, value in results.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{chosen}")
            asked = [sample for sample in samples if sample["filter"] == chosen]
            yield TaskScore(
                task=task,
                version=str(found["versions"].get(task, "")),
                shots=int(found["n-shot"].get(task) or 0),
                metric=metric if chosen == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                items=len(asked) or None,
                items_digest=_digest(asked),
                values=_values(asked, metric, float(value)),
            )


def _values(samples: Sequence[Mapping[str, Any]], metric: str, score: float) -> tuple[float, ...]:
    """Return the value of each item if their mean is the score."""
    values = [sample.get(metric) for sample in samples]
    numbers = tuple(float(value) for value in values if isinstance(value, int | float))
    if not numbers or len(numbers) < len(values):
        return ()
    is_mean = math.isclose(sum(numbers) / len(numbers), score, rel_tol=1e-9, abs_tol=1e-12)
    return numbers if is_mean else ()


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    items = "\n".join(f"{sample['doc_id']} {sample['doc_hash']}" for sample in samples)
    return hashlib.sha256(items.encode()).hexdigest()
