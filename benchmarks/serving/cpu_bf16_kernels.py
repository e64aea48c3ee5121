"""How fast are the processor's kernels of bfloat16, and what of it is sparsity?

Single linear layers as they are served where vLLM computes in bfloat16: our 2:4 kernels, our dense
kernel, which is made with the same care, and vLLM's own dense layer, which is oneDNN's product on a
weight in an order of its own. Inputs and outputs are bfloat16.

Turns, copies and processes are those of ``cpu_kernels.py``; with no ``OMP_NUM_THREADS`` all cores
are used::

    [OMP_NUM_THREADS=1] python -m benchmarks.serving.cpu_bf16_kernels [--cold-mib 384]
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch

from benchmarks.serving.cpu_kernels import (
    Product,
    Row,
    measure,
    measure_shapes,
    own_product,
    show_one_shape,
)
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels import KERNELS, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cpu.library import Bf16Unit, Tiles, native_library
from sparseserve.sparsity import TWO_FOUR

# Of models of 135M, 0.5B, 1B and 8B parameters.
SHAPES = (
    (576, 576),
    (1536, 576),
    (576, 1536),
    (896, 896),
    (4864, 896),
    (896, 4864),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
# For a few tokens sums of float32 may be as fast.
SPARSE = ("cpu_bf16", "cpu_bf16_tiles", "cpu_direct")
DENSE = ("cpu_bf16_dense",)


def products(rows: int, columns: int, copies: int) -> dict[str, list[Product]]:
    """Return every product, once for each copy of the weight."""
    weight = TWO_FOUR.project(torch.randn(rows, columns)).bfloat16()
    spec = LinearSpec(rows, columns, torch.bfloat16, torch.device("cpu"), two_four=True)
    loaded = LoadedWeight((RowBlock("layer", pack24(weight)),))

    tiles = native_library().tiles is Tiles.READY
    names = [name for name in (*SPARSE, *DENSE) if tiles or name != "cpu_bf16_tiles"]
    packed = {name: KERNELS[name].pack(loaded, spec) for name in names}

    def own(name: str) -> Product:
        copy = tuple(tensor.clone() for tensor in packed[name])
        return own_product(KERNELS[name], copy, rows)

    return {
        **{name: [own(name) for _ in range(copies)] for name in names},
        "vllm_bfloat16": [vllm_product(loaded, spec) for _ in range(copies)],
    }


def vllm_product(loaded: LoadedWeight, spec: LinearSpec) -> Product:
    """Return what vLLM runs for a dense layer."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    from sparseserve.serving.plugin.engine_dense import EngineDense

    current_platform.import_kernels()
    kernel = EngineDense(UnquantizedLinearMethod())
    return own_product(kernel, kernel.pack(loaded, spec), spec.rows)


def measure_shape(rows: int, columns: int, batches: Sequence[int], cold_bytes: int) -> list[Row]:
    """Time one shape at all batch sizes in this process, on ``cold_bytes`` of packed weights."""
    torch.manual_seed(0)
    turns = products(rows, columns, -(-cold_bytes // (rows * columns * 9 // 8)))
    return [measure(rows, columns, batch, turns, torch.bfloat16) for batch in batches]


@click.command()
@click.option("--result", default="cpu-bf16-kernels.json", show_default=True)
@click.option("--cold-mib", default=96, show_default=True, help="More than the last cache holds.")
@click.option("--smoke", is_flag=True, help="One tiny shape, nothing written: does it run?")
def main(result: str, cold_mib: int, smoke: bool) -> None:
    if smoke:
        show_one_shape(measure_shape)
        return
    if native_library().bf16_units[-1] is Bf16Unit.PORTABLE:
        raise click.ClickException("this processor does not multiply bfloat16 with AVX-512")
    measure_shapes(measure_shape, SHAPES, BATCHES, cold_mib * 2**20, result)


if __name__ == "__main__":
    main()
