"""How fast are the processor's 2:4 kernels, and what of it is sparsity?

Single linear layers at several batch sizes: our 2:4 kernels, our dense kernel of 16-bit values,
which has the same layout and the same care, and torch's products in float32 and bfloat16. Weights
are bfloat16 values; inputs and outputs float32, but bfloat16 for torch's bfloat16 product. All
take turns in random order, on as many copies of a weight as no cache holds, as in a forward pass.
Where a process's weights lie in memory moves small products by up to a third, so every shape is
timed in several fresh processes, and the median of their medians is kept::

    OMP_NUM_THREADS=1 python -m benchmarks.serving.cpu_kernels [--cold-mib 384]
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

import click
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.harness.results import RESULTS, write_result
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels import KERNELS, LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.choice.plan import batches_of
from sparseserve.sparsity import TWO_FOUR

SHAPES = (
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (1536, 576),
    (576, 1536),
    (576, 576),
    (192, 576),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256)
# cpu_int8_kernels.py and cpu_bf16_kernels.py compare the others.
OWN = {
    name: kernel
    for name, kernel in KERNELS.items()
    if name.startswith("cpu_") and not name.startswith(("cpu_int8", "cpu_bf16"))
}
REPEATS = 5
PROCESSES = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One shape and batch size: milliseconds by product, medians over the repeats."""

    rows: int
    columns: int
    batch: int
    copies: int
    milliseconds: dict[str, float]


Product = Callable[[Tensor], Tensor]


def products(rows: int, columns: int, copies: int) -> dict[str, list[Product]]:
    """Return every product, once for each copy of the weight."""
    weight = TWO_FOUR.project(torch.randn(rows, columns)).bfloat16()
    wide = weight.float()
    spec = LinearSpec(rows, columns, torch.float32, torch.device("cpu"), two_four=True)
    loaded = LoadedWeight((RowBlock("layer", pack24(wide)),))
    return {
        **{
            name: [own_product(kernel, kernel.pack(loaded, spec), rows) for _ in range(copies)]
            for name, kernel in OWN.items()
        },
        "torch_float32": [torch_product(wide.clone()) for _ in range(copies)],
        "torch_bfloat16": [torch_product(weight.clone()) for _ in range(copies)],
    }


def own_product(kernel: LinearKernel, packed: tuple[Tensor, ...], rows: int) -> Product:
    return lambda inputs: kernel.matmul(packed, inputs, None, rows)


def torch_product(weight: Tensor) -> Product:
    return lambda inputs: linear(inputs, weight)


def measure(
    rows: int,
    columns: int,
    batch: int,
    turns: dict[str, list[Product]],
    dtype: torch.dtype = torch.float32,
) -> Row:
    """Time all products in turns on inputs of ``dtype``; a turn runs every copy once."""
    inputs = torch.randn(batch, columns).to(dtype)
    narrow = inputs.bfloat16()
    able = {
        name: runs
        for name, runs in turns.items()
        if name not in KERNELS or batch in batches_of(KERNELS[name])
    }
    taken: dict[str, list[float]] = {name: [] for name in able}
    # Long batches spend their time in arithmetic: fewer copies show the same.
    copies = max(1, len(next(iter(turns.values()))) // batch)
    shuffled = random.Random(0)
    for _ in range(REPEATS):
        for name in shuffled.sample(list(able), len(able)):
            x = narrow if name == "torch_bfloat16" else inputs
            # What the product before left behind, freed memory above all, is not this one's cost.
            able[name][-1](x)
            started = time.perf_counter()
            for run in able[name][:copies]:
                run(x)
            taken[name].append((time.perf_counter() - started) / copies * 1000)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return Row(rows, columns, batch, copies, medians)


def measure_shape(rows: int, columns: int, batches: Sequence[int], cold_bytes: int) -> list[Row]:
    """Time one shape at all batch sizes in this process, on ``cold_bytes`` of packed weights."""
    torch.manual_seed(0)
    copies = -(-cold_bytes // (rows * columns * 9 // 8))
    turns = products(rows, columns, copies)
    return [measure(rows, columns, batch, turns) for batch in batches]


MeasureShape = Callable[[int, int, Sequence[int], int], list[Row]]


def measure_in_processes(
    measure_shape: MeasureShape, rows: int, columns: int, batches: Sequence[int], cold_bytes: int
) -> list[Row]:
    """Time one shape in fresh processes, one after the other; medians over them."""
    runs = []
    for _ in range(PROCESSES):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            runs.append(fresh.submit(measure_shape, rows, columns, batches, cold_bytes).result())
    return [median_row(list(same)) for same in zip(*runs, strict=True)]


def median_row(runs: list[Row]) -> Row:
    """Combine one shape and batch size of several processes."""
    milliseconds = {
        name: statistics.median(run.milliseconds[name] for run in runs)
        for name in runs[0].milliseconds
    }
    return replace(runs[0], milliseconds=milliseconds)


@click.command()
@click.option("--result", default="cpu-kernels.json", show_default=True)
@click.option("--cold-mib", default=96, show_default=True, help="More than the last cache holds.")
@click.option("--smoke", is_flag=True, help="One tiny shape, nothing written: does it run?")
def main(result: str, cold_mib: int, smoke: bool) -> None:
    if smoke:
        show_one_shape(measure_shape)
    else:
        measure_shapes(measure_shape, SHAPES, BATCHES, cold_mib * 2**20, result)


def show_one_shape(measure_shape: MeasureShape) -> None:
    """Print the times of one tiny shape."""
    for row in measure_shape(64, 64, (1, 32), 8192):
        click.echo(json.dumps(asdict(row)))


def measure_shapes(
    measure_shape: MeasureShape,
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    cold_bytes: int,
    result: str,
) -> None:
    """Time all shapes and write the file ``result``."""
    found = []
    for rows, columns in shapes:
        found += measure_in_processes(measure_shape, rows, columns, batches, cold_bytes)
        click.echo(f"{rows} x {columns}", err=True)
    setting = {"cold_bytes": cold_bytes, "repeats": REPEATS, "processes": PROCESSES}
    write_result(RESULTS / result, setting, rows=found)


if __name__ == "__main__":
    main()
