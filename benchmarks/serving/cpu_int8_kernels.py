"""How fast is the processor's 2:4 kernel for int8 codes, and how exact?

Single linear layers at several batch sizes: our int8 kernel, our 2:4 kernels on the same weight in
bfloat16, torch's dense products in float32 and bfloat16, and vLLM's dense product of int8, which is
oneDNN's with a scale for each token. Both int8 products are timed with the quantization of their
activations. Where a processor has no VNNI, oneDNN adds pairs of products in 16 bits, which
saturate: so the error of every product is kept, too, relative to the float32 product of the same
weight. (oneDNN as torch calls it is left out: it prepares anew for every new scale.)

Turns, copies and processes are those of ``cpu_kernels.py``::

    OMP_NUM_THREADS=1 python -m benchmarks.serving.cpu_int8_kernels [--cold-mib 384]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import click
import torch
from torch import Tensor

from benchmarks.serving.cpu_kernels import (
    Product,
    Row,
    measure,
    measure_shapes,
    own_product,
    show_one_shape,
    torch_product,
)
from sparseserve.checkpoint.packed24 import pack24
from sparseserve.checkpoint.quantized24 import Quantized24
from sparseserve.serving.kernels import KERNELS, LinearSpec, LoadedWeight, RowBlock
from sparseserve.sparsity import TWO_FOUR

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (2048, 8192))
BATCHES = (1, 4, 16, 32, 128, 512)
FLOAT_KERNELS = ("cpu_direct", "cpu_unpacked", "cpu_unpacked_matmul")
PRODUCTS = (
    "cpu_int8",
    *FLOAT_KERNELS,
    "torch_float32",
    "torch_bfloat16",
    "vllm_int8",
)


@dataclass(frozen=True, slots=True)
class Int8Row(Row):
    """One shape and batch size, also with the relative error of each product."""

    errors: dict[str, float]


def products(rows: int, columns: int, copies: int) -> dict[str, list[Product]]:
    """Return every product, once for each copy of the weight."""
    codes = torch.randint(-127, 128, (rows, columns)).float()
    dense = TWO_FOUR.project(codes).to(torch.int8)
    scale = 0.001 + 0.01 * torch.rand(rows)
    wide = dense.float() * scale[:, None]
    quantized = Quantized24(pack24(dense), scale[:, None], torch.bfloat16)
    loaded = LoadedWeight((RowBlock("layer", quantized),))
    cpu = torch.device("cpu")
    spec = LinearSpec(rows, columns, torch.float32, cpu, two_four=True, quantized="int8")

    packed = {name: KERNELS[name].pack(loaded, spec) for name in ("cpu_int8", *FLOAT_KERNELS)}

    def own(name: str) -> Product:
        copy = tuple(tensor.clone() for tensor in packed[name])
        return own_product(KERNELS[name], copy, rows)

    make: dict[str, Callable[[], Product]] = {
        **{name: partial(own, name) for name in ("cpu_int8", *FLOAT_KERNELS)},
        "torch_float32": lambda: torch_product(wide.clone()),
        "torch_bfloat16": lambda: torch_product(wide.bfloat16()),
        "vllm_int8": lambda: vllm_int8_product(dense, scale),
    }
    return {name: [make[name]() for _ in range(copies)] for name in PRODUCTS}


def vllm_int8_product(dense: Tensor, scale: Tensor) -> Product:
    """Return vLLM's call of oneDNN's product of int8: what it runs W8A8 checkpoints with."""
    from vllm import _custom_ops as operators
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    own_scale = scale[:, None].clone()  # the handler keeps its address
    handler = operators.create_onednn_scaled_mm(
        dense.t(), own_scale, torch.float32, True, False, 32
    )

    def run(inputs: Tensor) -> Tensor:
        numbers, token_scales, _ = operators.onednn_scaled_int8_quant(inputs, None, None, True)
        product = torch.empty(len(inputs), len(own_scale))
        operators.onednn_scaled_mm(handler, numbers, product, token_scales, None, None, None)
        return product

    return run


def errors(turns: dict[str, list[Product]], columns: int) -> dict[str, float]:
    """Return how far each product is from that in float32, in the norm of the latter."""
    inputs = torch.randn(8, columns)
    exact = turns["torch_float32"][0](inputs)
    found = {}
    for name, runs in turns.items():
        product = runs[0](inputs.bfloat16() if name == "torch_bfloat16" else inputs)
        found[name] = float((product.float() - exact).norm() / exact.norm())
    return found


def measure_shape(rows: int, columns: int, batches: Sequence[int], cold_bytes: int) -> list[Row]:
    """Time one shape at all batch sizes in this process, on ``cold_bytes`` of packed codes."""
    torch.manual_seed(0)
    turns = products(rows, columns, -(-cold_bytes // (rows * columns * 5 // 8)))
    found = errors(turns, columns)
    timed = [measure(rows, columns, batch, turns) for batch in batches]
    return [
        Int8Row(row.rows, row.columns, row.batch, row.copies, row.milliseconds, found)
        for row in timed
    ]


@click.command()
@click.option("--result", default="cpu-int8-kernels.json", show_default=True)
@click.option("--cold-mib", default=48, show_default=True, help="More than the last cache holds.")
@click.option("--smoke", is_flag=True, help="One tiny shape, nothing written: does it run?")
def main(result: str, cold_mib: int, smoke: bool) -> None:
    if smoke:
        show_one_shape(measure_shape)
    else:
        measure_shapes(measure_shape, SHAPES, BATCHES, cold_mib * 2**20, result)


if __name__ == "__main__":
    main()
