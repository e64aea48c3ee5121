"""How fast are the processor's 2:4 kernels, and what of it is sparsity?

Single linear layers at several batch sizes: our 2:4 kernels, our dense kernel of 16-bit values,
which has the same layout and the same care, and torch's products in float32 and bfloat16. Weights
are bfloat16 values; inputs and outputs float32, but bfloat16 for torch's bfloat16 product. All
take turns in random order, on as many copies of a weight as no cache holds, as in a forward pass::

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_kernels
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.operator_data import write_result
from sparseserve.serving.kernels import KERNELS, LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.plan import batches_of
from sparseserve.sparsity import TWO_FOUR, pack24

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
OWN = {name: kernel for name, kernel in KERNELS.items() if name.startswith("cpu_")}
# More than the last cache of the processors this is for.
_COLD_BYTES = 96 * 2**20
_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Row:
    """One shape and batch size: milliseconds by product, medians over the repeats."""

    rows: int
    columns: int
    batch: int
    copies: int
    milliseconds: dict[str, float]


Product = Callable[[Tensor], object]


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


def measure(rows: int, columns: int, batch: int, turns: dict[str, list[Product]]) -> Row:
    """Time all products in turns; a turn runs every copy once."""
    inputs = torch.randn(batch, columns)
    narrow = inputs.bfloat16()
    able = {
        name: runs
        for name, runs in turns.items()
        if name not in OWN or batch in batches_of(OWN[name])
    }
    taken: dict[str, list[float]] = {name: [] for name in able}
    # Long batches spend their time in arithmetic: fewer copies show the same.
    copies = max(1, len(turns["cpu_dense"]) // batch)
    shuffled = random.Random(0)
    for _ in range(_REPEATS):
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


@click.command()
@click.option("--result", default="cpu-kernels.json", show_default=True)
@click.option("--smoke", is_flag=True, help="One tiny shape, nothing written: does it run?")
def main(result: str, smoke: bool) -> None:
    torch.manual_seed(0)
    found = []
    for rows, columns in [(64, 64)] if smoke else SHAPES:
        copies = 2 if smoke else max(1, -(-_COLD_BYTES // (rows * columns * 9 // 8)))
        turns = products(rows, columns, copies)
        for batch in (1, 32) if smoke else BATCHES:
            found.append(measure(rows, columns, batch, turns))
            click.echo(json.dumps(asdict(found[-1])), err=not smoke)
        del turns
    if not smoke:
        write_result(result, {"cold_bytes": _COLD_BYTES, "repeats": _REPEATS}, found)


if __name__ == "__main__":
    main()
