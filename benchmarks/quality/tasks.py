"""What does pruning cost on zero-shot tasks?

Every model answers all items of PIQA, OpenBookQA and BoolQ as ``sparseserve evaluate --tasks``
asks them, which is lm-eval's way. The data sets come from a package of the index
(``benchmarks.demo.task_data``). The first model is the dense one; each other one is compared with
it item by item. A model's answers are written to the JSON as soon as they are all there; answers
already there are not asked for again::

    python -m benchmarks.demo.assets smollm2
    sparseserve prune-and-export demo/models/smollm2-135m -o demo/sparseserve
    python -m benchmarks.peers.checkpoint demo/models/smollm2-135m demo/llm-compressor
    python -m benchmarks.quality.tasks tasks-smollm2.json dense=demo/models/smollm2-135m \
        llm-compressor=demo/llm-compressor sparseserve=demo/sparseserve

Where BoolQ is asked, no text that the models were calibrated with may hold its passages.
``--calibration`` names these texts; the script looks for the passages. The texts called wikipedia
and mixed in ``benchmarks.demo.assets`` are made from them and are refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from benchmarks.demo.task_data import make_task_data
from benchmarks.harness.machine import Machine
from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, stored, write_result
from sparseserve.cli.console import quiet_libraries
from sparseserve.errors import SparseServeError
from sparseserve.evaluation.evaluate import Backend
from sparseserve.evaluation.task_comparison import compare_scores
from sparseserve.evaluation.tasks import TaskReport, TaskScore, TaskSpec, evaluate_tasks
from sparseserve.testing import save_tiny_model
from sparseserve.text import read_text

TASKS = ("piqa", "openbookqa", "boolq")
PACKAGED = "packaged"
SMOKE_ITEMS = 2


class KnownPassageError(SparseServeError, click.ClickException):
    """A calibration text holds what a task asks about; a command ends with its one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is the same for every model; ``data`` holds the SHA-256 of each task's items."""

    tasks: tuple[str, ...]
    data: dict[str, str]
    calibration: tuple[str, ...]
    limit: int | None
    batch_size: int
    backend: Backend
    harness: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The scores of one model by the code of ``commit``.

    ``scores`` are TaskScore as JSON. In place of ``values``, ``answers`` has a 1 for each right
    answer and a 0 for each other.
    """

    model: str
    checkpoint: str
    dtype: str
    scores: list[dict[str, Any]]
    seconds: float
    commit: str

    @classmethod
    def of(cls, model: str, checkpoint: str, report: TaskReport) -> Run:
        return cls(
            model=model,
            checkpoint=Path(checkpoint).name,
            dtype=report.dtype,
            scores=[stored_score(score) for score in report.scores],
            seconds=report.seconds,
            commit=Machine.here().commit,
        )

    def task_scores(self) -> list[TaskScore]:
        """Return what the model's report had."""
        scores = []
        for found in self.scores:
            plain = dict(found)
            answers = plain.pop("answers")
            scores.append(TaskScore(**plain, values=tuple(map(float, answers))))
        return scores


def measure(
    models: Mapping[str, str], setting: Setting, folder: Path, runs: list[Run]
) -> Iterator[list[Run]]:
    """Ask each model that has no run yet, and yield all runs after each."""
    spec = TaskSpec(
        tasks=setting.tasks,
        folder=folder,
        limit=setting.limit,
        batch_size=setting.batch_size,
        backend=setting.backend,
    )
    for name, checkpoint in models.items():
        if any(run.model == name for run in runs):
            continue
        click.echo(f"{name}: {', '.join(setting.tasks)}", err=True)
        runs = [*runs, Run.of(name, checkpoint, evaluate_tasks(checkpoint, spec))]
        yield runs


def differences(runs: Sequence[Run], dense: str) -> list[dict[str, Any]]:
    """Compare every model with the one called ``dense``."""
    (base,) = (run.task_scores() for run in runs if run.model == dense)
    return [
        {"model": run.model, **asdict(each)}
        for run in runs
        if run.model != dense
        for each in compare_scores(base, run.task_scores())
    ]


def refuse_known_passages(items: Path, texts: Sequence[str]) -> None:
    """Refuse to ask about passages that a calibration text holds.

    Raises:
        KnownPassageError: Names the text and how many there are.
    """
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    passages = {row["passage"].partition(" -- ")[2] for row in rows}
    for name in texts:
        text = "\n".join(map(str, read_text(None if name == PACKAGED else name).documents))
        if known := sum(passage in text for passage in passages):
            raise KnownPassageError(
                f"calibration text {name} holds {known} of the {len(passages)} passages of BoolQ: "
                "leave boolq out with --tasks, or compare models that were calibrated with another"
            )


def stored_score(score: TaskScore) -> dict[str, Any]:
    plain = asdict(score)
    values = plain.pop("values")
    if not set(values) <= {0.0, 1.0}:
        raise ValueError(f"{score.task}: {score.metric} is not right or wrong")
    return {**plain, "answers": "".join(str(int(value)) for value in values)}


def tasks_table(result: Result) -> str:
    """What each model answers right, and by how much that differs from the dense model."""
    setting, runs = result["setting"], result["runs"]
    differences = {
        (each["model"], each["task"], each["metric"]): each for each in result["differences"]
    }
    metrics = [(score["task"], score["metric"]) for score in runs[0]["scores"]]
    lines = [head("model", *(f"{task}, {metric}" for task, metric in metrics))]
    for run in runs:
        cells = []
        for score in run["scores"]:
            cell = f"{score['value']:.1%} ± {score['standard_error']:.1%}"
            if found := differences.get((run["model"], score["task"], score["metric"])):
                cell += f" ({found['difference']:+.1%} ± {found['standard_error']:.1%})"
            cells.append(cell)
        lines.append(line(run["model"], *cells))
    items = {score["task"]: score["items"] for score in runs[0]["scores"]}
    asked = ", ".join(f"{count:,} items of {task}" for task, count in items.items())
    lines.append(
        f"\n{asked}, no examples; {setting['harness']}. After ± stands the standard error; in "
        "brackets the difference from the dense model, its error item by item. "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


def _named(values: Sequence[str]) -> dict[str, str]:
    models = dict(value.partition("=")[::2] for value in values)
    if len(models) < len(values) or not all(models.values()):
        raise click.BadParameter(f"{' '.join(values)}: give each model once, as NAME=FOLDER")
    return models


@click.command()
@click.argument("result", required=False)
@click.argument("models", nargs=-1)
@click.option("--tasks", default=",".join(TASKS), show_default=True)
@click.option("--calibration", multiple=True, help="Text of the models; default: the packaged one.")
@click.option("--limit", type=int, help="Items of each task; default: all.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--backend", type=click.Choice(["transformers", "vllm"]), default="transformers")
@click.option("--smoke", is_flag=True, help="Two items, a tiny model: does the script run?")
def main(
    *,
    result: str | None,
    models: tuple[str, ...],
    tasks: str,
    calibration: tuple[str, ...],
    limit: int | None,
    batch_size: int,
    backend: Backend,
    smoke: bool,
) -> None:
    """Write RESULT in benchmarks/results/: the scores of MODELS, each NAME=FOLDER, dense first."""
    quiet_libraries()
    if smoke:
        _smoke()
        return
    if result is None or not models:
        raise click.UsageError("give the name of the result and models as NAME=FOLDER")
    folder = make_task_data(Path("demo"))
    texts = calibration or (PACKAGED,)
    setting = setting_of(
        tasks,
        folder,
        calibration=texts,
        limit=limit,
        batch_size=batch_size,
        backend=backend,
    )
    if "boolq" in setting.tasks:
        refuse_known_passages(folder / "boolq.jsonl", texts)
    path, named = RESULTS / result, _named(models)
    runs = [Run(**run) for run in stored(path, setting)]
    for found in measure(named, setting, folder, runs):
        write_result(path, setting, runs=found, differences=differences(found, next(iter(named))))


def setting_of(
    tasks: str,
    folder: Path,
    *,
    calibration: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 1,
    backend: Backend = "transformers",
) -> Setting:
    names = tuple(tasks.split(","))
    files = {name: folder / f"{name}.jsonl" for name in names}
    return Setting(
        tasks=names,
        data={name: sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        calibration=tuple(calibration),
        limit=limit,
        batch_size=batch_size,
        backend=backend,
        harness=f"lm-eval {metadata.version('lm-eval')}",
    )


def _smoke() -> None:
    row = {"goal": "open it", "sol1": "push", "sol2": "pull"}
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), save_tiny_model("llama", Path(scratch) / "tiny")
        lines = (json.dumps({**row, "label": item % 2}) + "\n" for item in range(SMOKE_ITEMS))
        (folder / "piqa.jsonl").write_text("".join(lines), encoding="utf-8")
        setting = setting_of("piqa", folder)
        models = {"dense": str(model), "again": str(model)}
        *_, runs = measure(models, setting, folder, [])
    for each in (*runs[0].scores, *differences(runs, "dense")):
        click.echo(json.dumps(each))


if __name__ == "__main__":
    main()
