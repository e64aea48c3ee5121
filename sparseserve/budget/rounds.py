"""One round of the search within a budget: prune with some units left dense, and measure."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparseserve.budget.knapsack import Allocation
from sparseserve.budget.price_run import SensitivityRun
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.budget.report import Round, TextIncrease
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.sealed import read_sealed, write_sealed
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.evaluation.evaluate import load_for_evaluation
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.exporters import EXPORTERS
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.layer_folder import LayerFolder
from sparseserve.models.model_folder import find_model_folder
from sparseserve.workflow.run import prune_and_export


@dataclass(frozen=True, slots=True)
class BudgetWork:
    """All that a round needs.

    Attributes:
        run: The model, the texts, and the folder everything unfinished lies in.
        units: What may be pruned or left dense, in the order of the model.
    """

    run: SensitivityRun
    units: tuple[UnitSensitivity, ...]

    @property
    def prunable(self) -> int:
        """Weights of all units."""
        return sum(unit.weights for unit in self.units)

    def round(self, allocation: Allocation) -> Round:
        """Prune what ``allocation`` says and measure it, or read what was measured before."""
        pruned = set(allocation.pruned)
        dense = tuple(
            name
            for index, unit in enumerate(self.units)
            if index not in pruned
            for name in unit.operators
        )
        share = allocation.weights / self.prunable
        stored = self.run.folder.path / f"{_key(dense)}.json"
        measured = read_sealed(stored)
        if isinstance(measured, dict):
            return Round.from_json(measured)
        dense_losses = _dense_losses(self.run)
        self.run.job.progress.stage(
            f"pruning {share:.1%} of the weights, predicted {allocation.price:.4f} nats"
        )
        artifact = self.artifact(dense)
        losses = _losses(self.run, artifact.path)
        found = Round(
            dense_operators=dense,
            sparse_share=share,
            predicted=allocation.price,
            measured=tuple(
                TextIncrease.of(text.name, *pair)
                for text, *pair in zip(self.run.texts, dense_losses, losses, strict=True)
            ),
        )
        write_sealed(stored, asdict(found))
        self.run.job.progress.stage(
            f"measured {max(item.increase for item in found.measured):.4f} nats, "
            f"at most {found.bound:.4f}"
        )
        return found

    def folder(self, dense: Sequence[str]) -> Path:
        """Return where the model with ``dense`` left as it is lies."""
        return self.run.folder.path / _key(dense)

    @property
    def stored_as(self) -> str:
        """The format of the rounds: the result's, or where that is not read here, its source's."""
        wanted = self.run.job.stored_as
        return wanted if FORMATS[wanted].storage is not None else "dense"

    def result(self, dense: Sequence[str]) -> Artifact:
        """Return the model with ``dense`` left as it is in the format that was asked for."""
        artifact, wanted = self.artifact(dense), self.run.job.stored_as
        if artifact.manifest.format == wanted:
            return artifact
        self.run.job.progress.stage(f"packing as {wanted}")
        return EXPORTERS[wanted](artifact, self.run.folder.fresh(wanted), None)

    def artifact(self, dense: Sequence[str]) -> Artifact:
        """Prune the model with ``dense`` left as it is, unless that was done before."""
        folder = self.folder(dense)
        if folder.exists():
            try:
                found = verify(folder)
                if found.manifest.format == self.stored_as:
                    return found
                # The command was given again with another --format.
                reason = f"{folder}: is stored as {found.manifest.format}, not {self.stored_as}"
            except ArtifactError as error:
                reason = str(error)
            self.run.job.progress.stage(f"{reason}: pruning that model again")
            shutil.rmtree(folder)
        exact = tuple(f"^{re.escape(name)}$" for name in dense)
        recipe = replace(self.run.job.recipe, ignore=(*self.run.job.recipe.ignore, *exact))
        return prune_and_export(
            replace(self.run.job, recipe=recipe, export_format=self.stored_as),
            folder,
            store=_RoundLayers(self.run, tuple(dense), not recipe.correction.chained),
        )


@dataclass(frozen=True, slots=True)
class _RoundLayers:
    """The layers of all rounds; one is reused where nothing that it depends on has changed.

    ``independent`` says that a pruned layer depends only on what is dense within it.
    """

    run: SensitivityRun
    dense: tuple[str, ...]
    independent: bool

    def load(self, layer: str) -> PrunedLayer | None:
        """Return the layer with the same operators left dense, or None."""
        return self._folder(layer).load(layer)

    def save(self, layer: str, pruned: PrunedLayer) -> None:
        """Keep a finished layer."""
        self._folder(layer).save(layer, pruned)

    def fresh(self, name: str) -> Path:
        """Return the path of a folder, not there yet, for what need not outlive the round."""
        return self.run.folder.fresh(name)

    def _folder(self, layer: str) -> LayerFolder:
        root = self.run.folder.path
        own = [name for name in self.dense if name.startswith(f"{layer}.")]
        key = _key(own if self.independent else self.dense)
        return LayerFolder(root / "rounds" / key, root, self.run.job.progress)


def _dense_losses(run: SensitivityRun) -> list[list[float]]:
    """Return the dense model's losses, measured once."""
    stored = run.folder.path / "dense-losses.json"
    losses = read_sealed(stored)
    if isinstance(losses, list):
        return losses
    run.job.progress.stage("measuring the dense model")
    measured = _losses(run, find_model_folder(run.job.source))
    write_sealed(stored, measured)
    return measured


def _losses(run: SensitivityRun, folder: Path) -> list[list[float]]:
    """Return the mean negative log-likelihood of each validation window of each text."""
    model = load_for_evaluation(folder, run.dtype).to(run.job.runs_on)
    found = []
    for text in run.texts:
        run.job.progress.stage(f"measuring {len(text.validation)} windows of {text.name}")
        found.append([math.log(perplexity(model, [w]).perplexity) for w in text.validation])
    return found


def _key(names: Sequence[str]) -> str:
    """Return a file name that stands for a set of operators."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
