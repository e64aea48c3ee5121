"""Runs of the main job on tiny models, by its function and by the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.cli import main
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import UNTRAINED
from sparseserve.testing import save_tiny_model
from sparseserve.text.calibration import CalibrationSpec
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export
from tests.integration.command_line import Cli, Done

TEXT = "\n\n".join(f"Line {i}: the {i * i % 97} quick brown foxes jump over it." for i in range(99))


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> PruneRecipe:
    """The cheapest recipe, on a short text of its own."""
    text = tmp_path_factory.mktemp("text") / "calibration.txt"
    text.write_text(TEXT)
    spec = CalibrationSpec(source=str(text), samples=3, sequence_length=16, seed=1, scrambled=0)
    return replace(UNTRAINED, pruner=Wanda(), calibration=spec)


Prune = Callable[..., Artifact]


@pytest.fixture(scope="session")
def prune_into(quick: PruneRecipe) -> Prune:
    """Prune a tiny family into a new folder, quickly."""

    def run(folder: Path, family: str) -> Artifact:
        source = save_tiny_model(family, folder.with_name(f"model-{folder.name}"))
        return prune_and_export(Job(str(source), quick, "packed24"), folder)

    return run


@pytest.fixture
def prune(tmp_path: Path, quick: PruneRecipe) -> Prune:
    """Prune a tiny family, or a folder, into ``tmp_path / name``."""

    def run(
        model: str | Path,
        name: str = "out",
        *,
        recipe: PruneRecipe = quick,
        export_format: str = "packed24",
        progress: PruneProgress | None = None,
    ) -> Artifact:
        source = model if isinstance(model, Path) else tmp_path / f"model-{model}"
        if not source.exists():
            save_tiny_model(str(model), source)
        job = Job(str(source), recipe, export_format, progress=progress or PruneProgress())
        return prune_and_export(job, tmp_path / name)

    return run


@pytest.fixture
def with_pruner(quick: PruneRecipe) -> Callable[..., PruneRecipe]:
    return lambda pruner, **changes: replace(quick, pruner=pruner, **changes)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the ``sparseserve`` entry point in ``tmp_path``, in this process, which is quick."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sparseserve", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        output = capfd.readouterr()
        return Done(int(end.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Long enough to calibrate on."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Sentence {i} of {i * 7 % 31} words." for i in range(200)))
    return file


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "llama")
