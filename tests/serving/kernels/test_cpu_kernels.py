"""The processor's kernels against float64 products, on every vector unit of this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.cli.console import warn_of_missing_kernels
from sparseserve.errors import ServingError
from sparseserve.serving.kernels import KERNELS, LinearKernel, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cpu.kernels import (
    CpuDense,
    CpuDirect,
    CpuUnpacked,
    CpuUnpackedMatmul,
)
from sparseserve.serving.kernels.cpu.library import (
    Unit,
    missing_library,
    native_library,
)
from sparseserve.sparsity import TWO_FOUR

CPU = torch.device("cpu")
NATIVE = Path(__file__).parents[3] / "serving" / "kernels" / "cpu" / "native"
CpuKernel = CpuDirect | CpuUnpacked | CpuUnpackedMatmul | CpuDense
KINDS: tuple[Callable[..., CpuKernel], ...] = (
    CpuDirect,
    CpuUnpacked,
    CpuUnpackedMatmul,
    CpuDense,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


def units() -> list[Unit]:
    return [unit for unit in Unit if unit <= native_library().best] if not missing_library() else []


def kernels() -> list[CpuKernel]:
    return [make(unit) for make, unit in product(KINDS, units())]


def name(kernel: CpuKernel) -> str:
    return f"{type(kernel).__name__}-{Unit(kernel.unit or 0).name}"


def packed(kernel: LinearKernel, weight: Tensor) -> tuple[Tensor, ...]:
    rows, columns = weight.shape
    spec = LinearSpec(rows, columns, weight.dtype, CPU, two_four=True)
    return kernel.pack(LoadedWeight((RowBlock("m", pack24(weight)),)), spec)


def two_four(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return TWO_FOUR.project(torch.randn(rows, columns, generator=generator))


def assert_product(
    kernel: LinearKernel, weight: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> None:
    """Compare with float64 within the bound of float32 sums, and one rounding of the result."""
    found = kernel.matmul(packed(kernel, weight), inputs, bias, len(weight))
    assert found.dtype == inputs.dtype
    w, x = weight.double(), inputs.double()
    exact, size = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    terms = weight.shape[1] + 1
    bound = terms * 2.0**-24 * size + torch.finfo(inputs.dtype).eps * exact.abs()
    # Below the smallest normal number rounding is absolute.
    bound += torch.finfo(inputs.dtype).tiny
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kernel", kernels(), ids=name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 40])
def test_products_are_right_in_every_dtype_and_batch(
    kernel: LinearKernel, dtype: torch.dtype, batch: int
) -> None:
    if kernel.largest_batch is not None and batch > kernel.largest_batch:
        with pytest.raises(ValueError, match="16 is the most"):
            kernel.matmul(packed(kernel, two_four(32, 32)), torch.ones(batch, 32), None, 32)
        return
    weight = two_four(72, 160).to(dtype)
    inputs, bias = torch.randn(batch, 160).to(dtype), torch.randn(72).to(dtype)
    assert_product(kernel, weight, inputs)
    assert_product(kernel, weight, inputs, bias)


@pytest.mark.parametrize("kernel", kernels(), ids=name)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 50),
    batch=st.integers(1, 16),
    stored=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_products_are_right_for_odd_shapes(
    *, kernel: LinearKernel, rows: int, groups: int, batch: int, stored: torch.dtype, seed: int
) -> None:
    weight = two_four(rows, 4 * groups, seed=seed).to(stored).float()
    generator = torch.Generator().manual_seed(seed + 1)
    assert_product(kernel, weight, torch.randn(batch, 4 * groups, generator=generator))


@pytest.mark.parametrize("kernel", kernels(), ids=name)
@pytest.mark.parametrize("stored", DTYPES)
def test_cancellation_zeros_and_denormals_stay_within_the_bound(
    kernel: LinearKernel, stored: torch.dtype
) -> None:
    weight = two_four(32, 64)
    weight[0] = 0
    weight[1] = TWO_FOUR.project(torch.full((1, 64), -0.0))[0]
    weight[2] *= 1e-6
    weight[3] = weight[3].abs() * 1e4
    weight = (weight.to(stored) + 0.0).float()
    inputs = torch.randn(4, 64)
    inputs[0] = torch.where(torch.arange(64) % 2 == 0, 1e6, -1e6)
    inputs[1] *= 1e-40
    inputs[2] = 0
    assert_product(kernel, weight, inputs)


@pytest.mark.parametrize("kernel", kernels(), ids=name)
def test_an_infinite_input_reaches_the_outputs_that_keep_its_weight(kernel: LinearKernel) -> None:
    weight = two_four(40, 32)
    inputs = torch.randn(1, 32)
    inputs[0, 5] = torch.inf
    found = kernel.matmul(packed(kernel, weight), inputs, None, 40)[0]
    kept = weight[:, 5] != 0
    assert torch.equal(found[kept], torch.inf * weight[kept, 5].sign())
    # Elsewhere a kernel may or may not multiply the infinity by a zero.
    assert bool((found[~kept].isnan() | found[~kept].isfinite()).all())


@pytest.mark.parametrize("kernel", kernels(), ids=name)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_product_with_the_identity_gives_the_weight_exactly(
    kernel: LinearKernel, stored: torch.dtype
) -> None:
    weight = two_four(50, 68).to(stored).float()
    rows = [
        kernel.matmul(packed(kernel, weight), part, None, 50)
        for part in torch.eye(68).view(17, 4, 68)
    ]
    assert torch.equal(torch.cat(rows).T, weight)


@pytest.mark.parametrize("kernel", kernels(), ids=name)
def test_the_number_of_threads_changes_no_bit(kernel: LinearKernel) -> None:
    weight, inputs = two_four(200, 256), torch.randn(3, 256)
    tensors, threads = packed(kernel, weight), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernel.matmul(tensors, inputs, None, 200))
    finally:
        torch.set_num_threads(threads)
    if isinstance(kernel, CpuUnpackedMatmul):  # the product is torch's
        torch.testing.assert_close(found[1], found[0])
    else:
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("stored", "share"), [(torch.bfloat16, 1.125), (torch.float32, 2.125)])
def test_a_weight_takes_the_bytes_of_its_values_and_positions(
    stored: torch.dtype, share: float
) -> None:
    weight = two_four(64, 128).to(stored).float()
    kept = packed(KERNELS["cpu_direct"], weight)
    assert sum(tensor.nbytes for tensor in kept) == share * weight.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (torch.ones(1, 31), 64),
        (torch.ones(1, 65), 64),
        (torch.ones(64), 64),
        (torch.ones(1, 64, dtype=torch.float64), 64),
        (torch.ones(1, 64), 65),
        (torch.ones(1, 64), 32),
        (torch.ones(1, 64, device="meta"), 64),
    ],
    ids=["narrow", "wide", "flat", "float64", "more rows", "fewer rows", "device"],
)
def test_operands_that_do_not_fit_never_reach_native_code(
    kind: Callable[..., LinearKernel], inputs: Tensor, rows: int
) -> None:
    tensors = packed(kind(), two_four(64, 64))
    with pytest.raises(ValueError, match=r"inputs|rows|batch"):
        kind().matmul(tensors, inputs, None, rows)
    for damaged in (tensors[0].transpose(0, 1), tensors[0][:, :, 1:].contiguous(), tensors[0][0]):
        with pytest.raises(ValueError, match="panels"):
            kind().matmul((damaged,), torch.ones(1, 64), None, 64)


def test_a_layer_that_no_kernel_of_the_processor_runs_says_why() -> None:
    spec = LinearSpec(8, 8, torch.float32, torch.device("cuda"), two_four=True)
    assert KERNELS["cpu_direct"].unsupported(spec) == "runs on a CPU, not on cuda"
    spec = LinearSpec(8, 8, torch.float64, CPU, two_four=True)
    assert KERNELS["cpu_unpacked"].unsupported(spec) == "does not know torch.float64"
    spec = LinearSpec(8, 8, torch.float32, CPU, two_four=False)
    assert KERNELS["cpu_unpacked_matmul"].unsupported(spec) == "a module of the layer is dense"
    assert KERNELS["cpu_dense"].unsupported(spec) is None


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        with pytest.raises(ServingError, match="were not built: install a C"):
            native_library()
    finally:
        native_library.cache_clear()


def test_a_user_is_told_when_layers_will_run_dense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_missing_kernels()
    assert not capsys.readouterr().err
    native_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        warn_of_missing_kernels()
        told = capsys.readouterr().err
        assert told.startswith("warning: 2:4 layers will run dense: the compiled kernels were not")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        warn_of_missing_kernels()
        assert not capsys.readouterr().err, "a GPU does not need them"
    finally:
        native_library.cache_clear()


def test_an_operation_that_there_is_not_is_refused() -> None:
    panels = packed(CpuDirect(), two_four(32, 32))[0]
    with pytest.raises(ValueError, match="knows no"):
        native_library().run(
            9,  # type: ignore[arg-type]  # no Operation
            panels,
            torch.ones(1, 32),
            torch.ones(1, 32),
            columns=32,
            unit=None,
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_kernels_stay_within_their_buffers_under_the_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    sources = [*NATIVE.glob("*.cpp"), Path(__file__).with_name("fuzz_kernels.cpp")]
    options = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *options, "-o", program, *sources], check=True, capture_output=True)
    ran = subprocess.run([program], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    library = native_library()
    floats, in_int8 = 540 * (library.best + 1), 90 * len(library.int8_units)
    without_tiles = 40 if len(library.bf16_units) == 2 and library.tiles else 0
    in_bf16 = 120 * len(library.bf16_units) - without_tiles
    assert ran.stdout == f"{floats} calls, {in_int8} in int8, {in_bf16} in bfloat16\n"
