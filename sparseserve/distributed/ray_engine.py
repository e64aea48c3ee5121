"""Pruning decoder layers on the machines of a Ray cluster, one task a layer.

The driver, which is the process of the command, runs the dense model once, layer by layer. What
enters a layer, and the layer, go to the cluster as soon as they are known, and some node prunes it
while the driver runs the dense layers after it. The driver stores each finished layer where a run
on one machine would, so an interrupted run goes on under either engine.

What is lost with a worker is done by another: Ray runs its tasks again. Whatever they need waits
in the driver's object store, or on a disk that all nodes share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparseserve.distributed.layer_task import LayerTask, layer_task, prune_task
from sparseserve.distributed.ray_cluster import connected, no_place_for, places_for, require_ray
from sparseserve.errors import ClusterError, RecipeError, SparseServeError, first_line
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.layerwise.pipeline import FinishedLayers, LayerWork
from sparseserve.machine import give_back_freed_memory
from sparseserve.recipe.settings import PruneRecipe

# How often a layer may be lost with its worker.
_RETRIES = 20
# Layers that wait in the object store, so that no node waits for the driver.
_AHEAD = 2
# After so long without a finished layer the nodes are looked at.
_SECONDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RayEngine:
    """Prunes independent decoder layers on a Ray cluster; an engine of the pipeline.

    After an error, layers that nodes are at work on end with the connection to the cluster. Where
    this process was connected before, the nodes finish them, and what they find is dropped.

    Attributes:
        address: ``HOST:PORT`` of the cluster's head, or ``auto`` for the one that this machine is
            part of. None is the one this process is connected to, or else that of RAY_ADDRESS, or
            else one of this machine alone.
        gpus_per_layer: GPUs of a task, 0.5 for two tasks a GPU; None is 1 where the driver runs on
            a GPU, else 0.
        shared_disk: Whether all nodes see the output folder under one path. Hidden states are then
            read from there and do not travel.
    """

    address: str | None = None
    gpus_per_layer: float | None = None
    shared_disk: bool = False

    def check(self, recipe: PruneRecipe, device: torch.device) -> None:
        """Refuse a ``recipe`` whose layers depend on one another, and options that do not fit.

        Raises:
            RecipeError: Names the option and the remedy.
            MissingExtraError: Ray is not installed.
        """
        if recipe.correction.chained:
            raise RecipeError(
                f"--engine ray: with error correction '{recipe.error_correction}' each layer "
                "depends on how those before it were pruned: use --recipe parallel, or "
                "--error-correction intra or none, or --engine local"
            )
        self._check_gpus(device)
        require_ray()

    def _check_gpus(self, device: torch.device) -> None:
        gpus = self.gpus_per_layer
        if gpus is None:
            return
        if not (math.isfinite(gpus) and gpus >= 0) or (gpus > 1 and gpus != int(gpus)):
            raise RecipeError(f"--gpus-per-layer {gpus} must be a whole number, or between 0 and 1")
        if (gpus > 0) != (device.type == "cuda"):
            raise RecipeError(
                f"--gpus-per-layer {gpus:g} with --device {device.type}: the command and the nodes "
                "must compute alike: give a layer GPUs with --device cuda, none with --device cpu"
            )

    def prune_layers(self, work: LayerWork) -> FinishedLayers:
        """Prune the layers that are not stored on the cluster, then write all into the model.

        Raises:
            ClusterError: It does not answer, has no node for a layer, or its nodes differ.
            NumericalError: Names the operator.
            ArtifactError: A disk is full or cannot be written.
        """
        finished = _Finished(work)
        earlier = finished.read_stored()
        if finished.missing():
            with connected(self.address):
                self._prune(work, finished)
        for name, layer in finished.layers.items():
            layer.write_to(work.model.get_submodule(name))
        reports = tuple(finished.layers[layer.name].report for layer in work.structure.layers)
        return FinishedLayers(reports, earlier)

    def _prune(self, work: LayerWork, finished: _Finished) -> None:
        """Run the dense model up to the last missing layer, and hand the missing ones out."""
        missing = finished.missing()
        streams = replace(work.streams, keep_inputs=False)
        # A task has as many threads as the driver, or its sums would be rounded otherwise.
        cpus = torch.get_num_threads() if work.device.type == "cpu" else 1
        tasks = _Tasks(finished, cpus, self._gpus(work.device))
        for number, (layer, call) in enumerate(
            zip(work.structure.layers, work.calls, strict=True), start=1
        ):
            if number > work.scrambled_layers:
                streams = streams.without_scrambled()
            entering = streams.required_dense
            if layer.name in missing:
                task = layer_task(work, number, streams, shared_disk=self.shared_disk)
                tasks.start(task, entering.path)
            if layer.name == missing[-1]:
                break
            module = work.model.get_submodule(layer.name)
            context = streams.enter(module, layer, call, work.device)
            streams = replace(streams, dense=context.required_dense.leaving)
            if layer.name not in missing:
                entering.path.unlink()
        tasks.finish()

    def _gpus(self, device: torch.device) -> float:
        if self.gpus_per_layer is not None:
            return self.gpus_per_layer
        return 1 if device.type == "cuda" else 0


@dataclass(slots=True)
class _Finished:
    """The layers that are done, by name, each stored and told of in the order of its end."""

    work: LayerWork
    layers: dict[str, PrunedLayer] = field(default_factory=dict)

    def read_stored(self) -> float:
        """Take over what an interrupted run had finished; return how long that took."""
        for layer in self.work.structure.layers:
            pruned = self.work.store.load(layer.name)
            if pruned is not None:
                self._tell(pruned, operators=False)
        return sum(pruned.report.seconds for pruned in self.layers.values())

    def missing(self) -> list[str]:
        """Return the layers that are not done, first to last."""
        names = (layer.name for layer in self.work.structure.layers)
        return [name for name in names if name not in self.layers]

    def add(self, pruned: PrunedLayer) -> None:
        """Store a layer that came back."""
        name = pruned.report.name
        self.work.store.save(name, pruned)
        # What is read from a file is mapped: memory does not grow with the layers.
        self._tell(self.work.store.load(name) or pruned, operators=True)

    def _tell(self, pruned: PrunedLayer, *, operators: bool) -> None:
        report, progress = pruned.report, self.work.progress
        self.layers[report.name] = pruned
        progress.layer_started(report.name, len(self.layers), len(self.work.structure.layers))
        for operator in report.operators if operators else ():
            progress.operator_pruned(operator)
        progress.layer_finished(report)


class _Tasks:
    """The layers that a cluster is at work on.

    None is cancelled after an error: Ray 2.60 ends the driver's process when a task comes back that
    was cancelled while it was handed to a worker ("Tried to complete task that was not pending").
    """

    def __init__(self, finished: _Finished, cpus: int, gpus: float) -> None:
        """Look for a node that can run a task of ``cpus`` cores and ``gpus`` GPUs.

        Raises:
            ClusterError: There is none.
        """
        import ray

        self._finished, self._cpus, self._gpus = finished, cpus, gpus
        self._running: dict[Any, Path] = {}
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(prune_task)
        places = places_for(cpus, gpus)
        if not places:
            raise no_place_for(cpus, gpus)
        self._say(f"pruning {len(finished.missing())} layers on a Ray cluster, {places} at once")

    def start(self, task: LayerTask, entering: Path) -> None:
        """Hand out ``task`` when there is room; ``entering`` is removed when it is done."""
        self._collect(wait=False)
        while len(self._running) >= places_for(self._cpus, self._gpus) + _AHEAD:
            self._collect(wait=True)
        self._running[self._remote.remote(task)] = entering
        give_back_freed_memory()

    def finish(self) -> None:
        """Wait for all tasks."""
        while self._running:
            self._collect(wait=True)

    def _collect(self, *, wait: bool) -> None:
        """Store what is done; if asked to, wait some time until something is."""
        import ray

        if not self._running:
            return
        count = 1 if wait else len(self._running)
        seconds = _SECONDS if wait else 0
        done, _ = ray.wait([*self._running], num_returns=count, timeout=seconds)
        for reference in done:
            self._finished.add(_result(reference))
            self._running.pop(reference).unlink()
        if wait and not done and not places_for(self._cpus, self._gpus):
            self._say("no node of the cluster is left that can take a layer: waiting for one")

    def _say(self, text: str) -> None:
        self._finished.work.progress.stage(text)


def _result(reference: Any) -> PrunedLayer:
    """Return the layer of a task that ended.

    Raises:
        ClusterError: It was lost with its worker again and again.
        SparseServeError: What stopped it.
    """
    import ray

    try:
        found: PrunedLayer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SparseServeError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"a layer was lost with its worker {_RETRIES} times ({first_line(error)}): see Ray's "
            "logs on that node; the same command goes on with the layers that are missing"
        ) from error
    return found
