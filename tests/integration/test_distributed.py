"""Pruning on a real Ray cluster: the bytes of a run on one machine, whatever is lost on the way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseserve import RayEngine
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.distributed import layer_task
from sparseserve.distributed.ray_cluster import connected
from sparseserve.errors import ClusterError
from sparseserve.layerwise.pipeline import Engine, LocalEngine
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS
from sparseserve.report import LayerReport
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export
from tests.integration.command_line import Cli, refusal
from tests.integration.conftest import TEXT
from tests.ray_end import quiet_end

ray = pytest.importorskip("ray", reason="the extra `distributed` is not installed")
# Its workers import torch and transformers, which takes long on a busy machine.
pytestmark = pytest.mark.timeout(900)


class Killed(Exception):
    """Stands for the death of the driver."""


class Listener(PruneProgress):
    """Keeps what it hears, and dies after a number of layers."""

    def __init__(self, dies_after: int = -1) -> None:
        self.left = dies_after
        self.numbers: list[int] = []
        self.pruned: set[str] = set()
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def layer_started(self, name: str, number: int, total: int) -> None:
        self.numbers.append(number)

    def operator_pruned(self, report: Any) -> None:
        self.pruned.add(report.name.split(".")[2])

    def layer_finished(self, report: LayerReport) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers of two kinds."""
    return save_tiny_model("gemma2", tmp_path_factory.mktemp("model") / "gemma2")


@pytest.fixture(scope="module")
def recipe(text: Path) -> PruneRecipe:
    parallel = PRESETS["parallel"]
    spec = replace(
        parallel.calibration, source=str(text), samples=4, sequence_length=16, scrambled_layers=2
    )
    return replace(parallel, calibration=spec, rotate="heads")


def prune(
    model: Path,
    recipe: PruneRecipe,
    out: Path,
    engine: Engine,
    progress: PruneProgress | None = None,
) -> Artifact:
    listener = progress or PruneProgress()
    return prune_and_export(Job(str(model), recipe, progress=listener, engine=engine), out)


@pytest.fixture(scope="module")
def local(model: Path, recipe: PruneRecipe, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prune(model, recipe, tmp_path_factory.mktemp("local") / "out", LocalEngine())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of this machine, begun in a folder that holds a module named torch."""
    folder = tmp_path_factory.mktemp("trap")
    (folder / "torch.py").write_text("raise SystemExit('code of the current folder was run')")
    with quiet_end(), chdir(folder), connected(None):
        yield


def timeless(report: Any) -> Any:
    """Return a report without what differs between two runs on one machine."""
    if isinstance(report, dict):
        return {
            key: timeless(value)
            for key, value in report.items()
            if key not in ("seconds", "peak_memory_bytes")
        }
    return [timeless(item) for item in report] if isinstance(report, list) else report


def same(found: Path, expected: Path) -> None:
    """Compare two checkpoints byte by byte, and their reports."""
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names - {"sparseserve.json"}:
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    reports = [
        timeless(json.loads((folder / "sparseserve.json").read_text())["report"])
        for folder in (found, expected)
    ]
    assert reports[0] == reports[1]


class TestBeforeThereIsACluster:
    def test_layers_that_depend_on_one_another(self, cli: Cli, model: Path, text: Path) -> None:
        line = refusal(cli("prune-and-export", model, "-o", "out", "--engine", "ray"))
        assert line.count("\n") == 0
        assert "'intra+inter'" in line
        assert "--recipe parallel" in line

    def test_an_address_where_nobody_answers(self, cli: Cli, model: Path, text: Path) -> None:
        short = ("--samples", 4, "--sequence-length", 16, "--calibration", text)
        where = ("--recipe", "parallel", "--engine", "ray", "--address")
        assert not ray.is_initialized()
        for address, reason in (("127.0.0.1:1", "refused"), ("ray://here:1", "is not HOST:PORT")):
            line = refusal(cli("prune-and-export", model, "-o", "out", *where, address, *short))
            assert f"--address '{address}': no Ray cluster can be used there" in line
            assert reason in line

    def test_gpus_for_a_command_on_the_processor(self, cli: Cli, model: Path) -> None:
        gpus = ("--recipe", "parallel", "--engine", "ray", "--device", "cpu", "--gpus-per-layer")
        assert "must compute alike" in refusal(cli("prune-and-export", model, "-o", "o", *gpus, 1))
        for odd in (-1, 1.5, "nan"):
            line = refusal(cli("prune-and-export", model, "-o", "o", *gpus, odd))
            assert "must be a whole number, or between 0 and 1" in line

    def test_options_of_ray_without_it(self, cli: Cli, model: Path) -> None:
        for option in (("--address", "auto"), ("--gpus-per-layer", 1), ("--shared-disk",)):
            done = cli("prune-and-export", model, "-o", "out", *option)
            assert done.returncode == 2
            assert f"{option[0]} goes with --engine ray." in done.stderr

    def test_ray_that_is_not_installed(
        self, cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        line = refusal(
            cli("prune-and-export", model, "-o", "out", "--recipe", "parallel", "--engine", "ray")
        )
        assert line.endswith("not installed: pip install 'sparseserve[distributed]'")


@pytest.mark.usefixtures("cluster")
def test_the_command_gives_the_bytes_of_one_process_on_a_cluster(
    cli: Cli, local: Artifact, model: Path, text: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'error_correction = "intra"\nrotate = "heads"\n'
        "[calibration]\nsamples = 4\nsequence_length = 16\nscrambled_layers = 2\n"
        f'source = "{text}"\n'
    )
    done = cli("prune-and-export", model, "-o", "out", "--recipe", mine, "--engine", "ray")
    assert done.returncode == 0, done.stderr
    same(tmp_path / "out", local.path)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "engines",
    ["ray, then local", pytest.param("local, then ray", marks=pytest.mark.further)],
)
def test_a_run_that_was_killed_goes_on_under_either_engine(
    local: Artifact, model: Path, recipe: PruneRecipe, tmp_path: Path, engines: str
) -> None:
    named: dict[str, Engine] = {"ray": RayEngine(shared_disk=True), "local": LocalEngine()}
    first, second = (named[name] for name in engines.split(", then "))
    listeners = Listener(dies_after=2), Listener()
    with pytest.raises(Killed):
        prune(model, recipe, tmp_path / "out", first, listeners[0])
    assert not (tmp_path / "out").exists()
    prune(model, recipe, tmp_path / "out", second, listeners[1])
    same(tmp_path / "out", local.path)
    assert len(listeners[0].pruned) == len(listeners[1].pruned) == 2
    assert not listeners[0].pruned & listeners[1].pruned
    assert [listener.numbers for listener in listeners] == [[1, 2], [1, 2, 3, 4]]


@pytest.mark.usefixtures("cluster")
def test_what_stops_a_worker_is_one_line_of_the_command(
    model: Path, recipe: PruneRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_task, "arithmetic_of", lambda device, rounded: "cpu, ABACUS")
    with pytest.raises(ClusterError, match=r"^node \S+ computes with cpu, .*use nodes of one kind"):
        prune(model, recipe, tmp_path / "out", RayEngine())


@pytest.mark.usefixtures("cluster")
def test_a_layer_that_fits_no_node_is_refused(
    cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1000)
    short = ("--samples", 4, "--sequence-length", 16, "--calibration", text)
    ray_engine = ("--recipe", "parallel", "--engine", "ray")
    line = refusal(cli("prune-and-export", model, "-o", "out", *ray_engine, *short))
    assert "a layer takes 1000 cores, and no node of the cluster has as many" in line
    assert "OMP_NUM_THREADS" in line


@pytest.mark.further
def test_the_layers_of_a_node_that_is_killed_are_done_elsewhere(
    local: Artifact, model: Path, recipe: PruneRecipe, tmp_path: Path
) -> None:
    with quiet_end(), two_nodes() as (nodes, doomed):
        listener = NodeKiller(nodes, doomed)
        prune(model, recipe, tmp_path / "out", RayEngine(address=nodes.address), listener)
    assert listener.was_at_work
    assert "pruning 4 layers on a Ray cluster, 2 at once" in listener.stages
    same(tmp_path / "out", local.path)


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """Start a cluster of two nodes of one core; give it and the node that may be lost."""
    from ray.cluster_utils import Cluster

    # An engine takes the cluster that its process is connected to, which other tests may share.
    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield nodes, nodes.add_node(num_cpus=1)
    finally:
        nodes.shutdown()


class NodeKiller(Listener):
    """Kills a node that is at work when the first layer is done."""

    def __init__(self, nodes: Any, doomed: Any) -> None:
        super().__init__()
        self.nodes, self.doomed, self.was_at_work = nodes, doomed, False

    def layer_finished(self, report: LayerReport) -> None:
        if self.was_at_work:
            return
        deadline = time.monotonic() + 120
        while not self.was_at_work and time.monotonic() < deadline:
            # A node that is new may not have told yet.
            free = ray._private.state.available_resources_per_node().get(self.doomed.node_id)
            self.was_at_work = free is not None and free.get("CPU", 0) == 0
        self.nodes.remove_node(self.doomed, allow_graceful=False)
