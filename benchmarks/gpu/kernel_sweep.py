"""Where does each 2:4 kernel pay, on this GPU?

Times every kernel that runs here, and the dense product, on the linear layers of real models from
1 to 4096 tokens, and measures its error against a float64 product::

    python -m benchmarks.gpu.kernel_sweep --output benchmarks/results/gpu-kernels.json

``--smoke`` takes seconds and needs no GPU: it shows that all is in place, and measures nothing
worth keeping.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.gpu.shapes import MODELS, SMOKE_MODELS
from benchmarks.gpu.timing import Runs, interleaved, packed_copies, prepare
from benchmarks.harness.machine import Machine
from sparseserve.checkpoint.tensors import write_json
from sparseserve.devices import DTYPES
from sparseserve.serving.kernels import (
    DENSE,
    KERNELS,
    LinearKernel,
    LinearSpec,
    LoadedWeight,
    RowBlock,
)
from sparseserve.serving.kernels.cuda.device import cuda_device
from sparseserve.sparsity import TWO_FOUR

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SMOKE_BATCHES = (1, 8)
ERROR_BATCH = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel, layer and batch size; seconds are of one product.

    Attributes:
        model: Whose layer it is.
        linear: Which of its layers.
        rows: Output features.
        columns: Input features.
        batch: Tokens.
        kernel: Its name.
        seconds: Median, in a captured graph.
        lower: First quartile of the same.
        upper: Third quartile of the same.
        eager_seconds: Median, launched one by one.
        speedup: Median of the dense product over this, in captured graphs.
    """

    model: str
    linear: str
    rows: int
    columns: int
    batch: int
    kernel: str
    seconds: float
    lower: float
    upper: float
    eager_seconds: float
    speedup: float


@dataclass(frozen=True, slots=True)
class LayerResult:
    """All of one layer.

    Attributes:
        measurements: By batch size and kernel.
        refusals: Why other kernels do not run it.
        errors: Largest error of each kernel, in units in the last place of the layer's dtype at
            the largest output.
    """

    measurements: list[Measurement]
    refusals: dict[str, str]
    errors: dict[str, float]


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True, help="Names, with commas.")
@click.option("--batches", default=",".join(map(str, BATCHES)), show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16")
@click.option("--repeats", type=int, default=30, show_default=True, help="Runs of each, in turns.")
@click.option("--smoke", is_flag=True, help="A tiny layer, on the CPU if there is no GPU.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the JSON.")
def main(
    *, models: str, batches: str, dtype: str, repeats: int, smoke: bool, output: Path | None
) -> None:
    """Time 2:4 kernels against the dense product."""
    if not smoke and not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device; --smoke runs without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = SMOKE_MODELS if smoke else {name: MODELS[name] for name in _names(models)}
    sizes = SMOKE_BATCHES if smoke else tuple(int(batch) for batch in batches.split(","))
    results: dict[str, dict[str, LayerResult]] = {}
    for model, decoder in chosen.items():
        for linear, (rows, columns) in decoder.linears().items():
            spec = LinearSpec(rows, columns, DTYPES[dtype], device, two_four=True)
            click.echo(f"{model} {linear}: {rows} x {columns}", err=True)
            found = layer_result(
                KERNELS,
                spec,
                model=model,
                linear=linear,
                batches=sizes,
                repeats=2 if smoke else repeats,
            )
            results.setdefault(model, {})[linear] = found
            _tell(found, sizes)
            if output:
                write_json(output, _document(results, dtype, repeats))


def layer_result(
    table: Mapping[str, LinearKernel],
    spec: LinearSpec,
    *,
    model: str,
    linear: str,
    batches: tuple[int, ...],
    repeats: int,
) -> LayerResult:
    """Measure all kernels on one layer."""
    refusals: dict[str, str] = {}
    copies: dict[str, list[tuple[Tensor, ...]]] = {}
    dense = TWO_FOUR.project(_random(spec.rows, spec)).to(spec.dtype)
    weight = LoadedWeight((RowBlock(linear, dense),))
    layouts: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, kernel in table.items():
        if reason := kernel.unsupported(spec):
            refusals[name] = reason
            continue
        if kernel.layout not in layouts:
            layouts[kernel.layout] = packed_copies(kernel, spec, weight)
        copies[name] = layouts[kernel.layout]
    errors = {name: _error(table[name], copies[name][0], dense, spec) for name in copies}
    measurements: list[Measurement] = []
    for batch in batches:
        # Shared by the graphs of one batch size: a pool cannot be used again once all its graphs
        # are gone.
        pool = torch.cuda.graph_pool_handle() if spec.device.type == "cuda" else None
        inputs = _random(batch, spec).to(spec.dtype)
        runs: dict[str, Runs] = {}
        for name, own in copies.items():
            if not _takes(table[name], batch):
                continue
            try:
                runs[name] = prepare(table[name], own, inputs, spec.rows, pool)
            except RuntimeError as error:
                if name == DENSE:
                    raise
                # An algorithm that fails on long prompts alone; the others are still of interest.
                refusals[f"{name} at batch {batch}"] = str(error).partition("\n")[0]
        measurements += _measure(
            runs, spec, model=model, linear=linear, batch=batch, repeats=repeats
        )
    return LayerResult(measurements, refusals, errors)


def _measure(
    runs: dict[str, Runs], spec: LinearSpec, *, model: str, linear: str, batch: int, repeats: int
) -> list[Measurement]:
    times = interleaved(runs, repeats)
    return [
        Measurement(
            model=model,
            linear=linear,
            rows=spec.rows,
            columns=spec.columns,
            batch=batch,
            kernel=name,
            seconds=replayed.median,
            lower=replayed.lower_quartile,
            upper=replayed.upper_quartile,
            eager_seconds=eager.median,
            speedup=times[DENSE][0].median / replayed.median,
        )
        for name, (replayed, eager) in times.items()
    ]


def _random(rows: int, spec: LinearSpec) -> Tensor:
    """Draw by a generator that no graph knows: a failed capture spoils the device's own."""
    generator = torch.Generator(spec.device).manual_seed(0)
    return torch.randn(rows, spec.columns, device=spec.device, generator=generator)


def _error(
    kernel: LinearKernel, packed: tuple[Tensor, ...], dense: Tensor, spec: LinearSpec
) -> float:
    batch = min(ERROR_BATCH, kernel.largest_batch or ERROR_BATCH)
    inputs = _random(batch, spec).to(spec.dtype)
    exact = inputs.double() @ dense.double().T
    found = kernel.matmul(packed, inputs, None, len(dense)).double()
    unit = torch.finfo(dense.dtype).eps * float(exact.abs().max())
    return float((found - exact).abs().max()) / unit


def _takes(kernel: LinearKernel, batch: int) -> bool:
    return kernel.largest_batch is None or batch <= kernel.largest_batch


def _names(models: str) -> list[str]:
    names = models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(MODELS)}")
    return names


def _tell(found: LayerResult, batches: tuple[int, ...]) -> None:
    for kernel, reason in found.refusals.items():
        click.echo(f"  {kernel}: {reason}", err=True)
    for batch in batches:
        of_batch = [one for one in found.measurements if one.batch == batch]
        dense = next(one for one in of_batch if one.kernel == DENSE)
        others = [one for one in of_batch if one.kernel != DENSE]
        line = f"  {batch} tokens: dense {dense.seconds * 1e6:.1f} us"
        if others:
            best = min(others, key=lambda one: one.seconds)
            line += f"; {best.kernel} {best.seconds * 1e6:.1f} us, {best.speedup:.2f} times as fast"
        click.echo(line, err=True)


def gpu_libraries() -> dict[str, object]:
    """Return what the times of a GPU depend on beside its name."""
    device = cuda_device(torch.device("cuda"))
    if device is None:
        return {}
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    return {
        "capability": ".".join(map(str, device.capability)),
        "cuda": torch.version.cuda,
        "cusparselt": device.cusparselt,
        "triton": triton,
    }


def _document(
    results: dict[str, dict[str, LayerResult]], dtype: str, repeats: int
) -> dict[str, object]:
    layers = {
        f"{model} {linear}": {"refusals": found.refusals, "errors_in_ulp": found.errors}
        for model, linears in results.items()
        for linear, found in linears.items()
    }
    return {
        "machine": {**asdict(Machine.here()), **gpu_libraries()},
        "setting": {"dtype": dtype, "repeats": repeats},
        "layers": layers,
        "measurements": [
            asdict(one)
            for linears in results.values()
            for found in linears.values()
            for one in found.measurements
        ],
    }


if __name__ == "__main__":
    main()
