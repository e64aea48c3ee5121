"""How does the time to prune a model fall with the nodes of a Ray cluster?

A random model is pruned by the recipe `parallel` in this process, and then on clusters of this
machine with more and more nodes of equally many cores. Each cluster first prunes a tiny model, so
that its workers have started. On one machine nodes share memory bandwidth, and the driver's dense
pass takes cores from them: give each node few cores, so that all together are fewer than the
machine has. ::

    OMP_NUM_THREADS=4 python -m benchmarks.quality.scaling --nodes 1 --nodes 2 --nodes 4
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.random_models import write_random_model
from benchmarks.harness.results import RESULTS, Result, write_result
from sparseserve.cli.console import quiet_libraries
from sparseserve.distributed.ray_cluster import connected, require_ray
from sparseserve.distributed.ray_engine import RayEngine
from sparseserve.layerwise.pipeline import Engine, LocalEngine
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.toml import PRESETS
from sparseserve.testing import TINY_VOCABULARY, save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run.

    Attributes:
        nodes: Of the cluster; 0 is this process alone.
        seconds: Wall time of the dense pass and of all layers.
        layer_seconds: What all layers took together, wherever they were pruned.
        peak_memory_bytes: Largest resident size of the driver so far.
    """

    nodes: int
    seconds: float
    layer_seconds: float
    peak_memory_bytes: int


def measure(model: Path, recipe: PruneRecipe, engine: Engine, nodes: int) -> Row:
    """Prune ``model`` and throw the result away."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(str(model), recipe, device=torch.device("cpu"), engine=engine)
        report = prune_and_export(job, Path(scratch) / "out").manifest.report
    layers = sum(layer["seconds"] for layer in report["layers"])
    return Row(
        nodes=nodes,
        seconds=round(report["seconds"], 1),
        layer_seconds=round(layers, 1),
        peak_memory_bytes=report["peak_memory_bytes"],
    )


@contextmanager
def cluster_of(nodes: int) -> Iterator[None]:
    """Be connected to a cluster of ``nodes`` that have as many cores as a layer has threads."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415  # Ray is optional

    cores = torch.get_num_threads()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=cores)
        with connected(cluster.address):
            yield
    finally:
        cluster.shutdown()


def scaling_table(result: Result) -> str:
    """Wall times by the number of nodes."""
    setting, rows = result["setting"], result["rows"]
    alone = next(row["seconds"] for row in rows if not row["nodes"])
    lines = [head("nodes", "seconds", "of one process", "sum over layers, s")]
    for row in rows:
        name = str(row["nodes"]) if row["nodes"] else "one process"
        share = f"{alone / row['seconds']:.2f}x speed"
        lines.append(line(name, f"{row['seconds']:,.0f}", share, f"{row['layer_seconds']:,.0f}"))
    lines.append(
        f"\nRecipe `parallel`, {setting['layers']} layers of Llama shape "
        f"{setting['hidden_size']} x {setting['intermediate_size']}, "
        f"{setting['samples']} windows of {setting['sequence_length']} tokens, "
        f"{setting['threads']} cores a node. "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.option("--nodes", multiple=True, type=int, default=(1, 2, 4), show_default=True)
@click.option("--layers", default=16, show_default=True)
@click.option("--hidden-size", default=1024, show_default=True)
@click.option("--intermediate-size", default=4096, show_default=True)
@click.option("--samples", default=32, show_default=True)
@click.option("--sequence-length", default=256, show_default=True)
@click.option("--smoke", is_flag=True, help="Two tiny layers on one node; writes nothing.")
def main(
    *,
    nodes: tuple[int, ...],
    layers: int,
    hidden_size: int,
    intermediate_size: int,
    samples: int,
    sequence_length: int,
    smoke: bool,
) -> None:
    quiet_libraries()
    require_ray()
    if smoke:
        nodes, layers, hidden_size, intermediate_size = (1,), 2, 64, 128
        samples, sequence_length = 4, 16
    parallel = PRESETS["parallel"]
    spec = replace(parallel.calibration, samples=samples, sequence_length=sequence_length)
    recipe = replace(parallel, calibration=spec)
    short = replace(recipe, calibration=replace(spec, samples=2, sequence_length=16))
    with tempfile.TemporaryDirectory() as scratch:
        model, tiny = Path(scratch) / "model", save_tiny_model("llama", Path(scratch) / "tiny")
        write_random_model(
            model,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            vocab_size=TINY_VOCABULARY,
        )
        rows = [measure(model, recipe, LocalEngine(), 0)]
        click.echo(json.dumps(asdict(rows[-1])))
        for count in nodes:
            with cluster_of(count):
                measure(tiny, short, RayEngine(), count)
                rows.append(measure(model, recipe, RayEngine(), count))
            click.echo(json.dumps(asdict(rows[-1])))
    if not smoke:
        setting = {
            "layers": layers,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "samples": samples,
            "sequence_length": sequence_length,
            "threads": torch.get_num_threads(),
        }
        write_result(RESULTS / "scaling.json", setting, rows=rows)


if __name__ == "__main__":
    main()
