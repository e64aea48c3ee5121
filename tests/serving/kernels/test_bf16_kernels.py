"""The kernels of bfloat16 against float64 products, on every vector unit of this machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from itertools import product as pairs_of
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels import KERNELS, LinearSpec, LoadedWeight, RowBlock
from sparseserve.serving.kernels.cpu import bf16_kernels
from sparseserve.serving.kernels.cpu.bf16_kernels import CpuBf16, CpuBf16Dense, CpuBf16Tiles
from sparseserve.serving.kernels.cpu.kernels import CpuDense, CpuDirect
from sparseserve.serving.kernels.cpu.library import (
    Bf16Unit,
    NativeLibrary,
    Tiles,
    missing_library,
    native_library,
)
from sparseserve.sparsity import TWO_FOUR

CPU = torch.device("cpu")
NATIVE = Path(__file__).parents[3] / "serving" / "kernels" / "cpu" / "native"
BF16 = torch.bfloat16
Bf16Kernel = CpuBf16 | CpuBf16Tiles | CpuBf16Dense
KINDS: tuple[Callable[..., Bf16Kernel], ...] = (CpuBf16, CpuBf16Tiles, CpuBf16Dense)

pytestmark = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


def own_units() -> tuple[Bf16Unit, ...]:
    return () if missing_library() else native_library().bf16_units


def lacking(kind: Callable[..., Bf16Kernel], unit: Bf16Unit) -> str | None:
    """Return what this processor lacks to run a kernel on a unit."""
    if unit not in own_units():
        return f"this processor has no {unit.name}"
    tiles = kind is CpuBf16Tiles and unit is not Bf16Unit.PORTABLE
    return "this processor has no AMX" if tiles and native_library().tiles else None


KERNELS_OF_UNITS = [
    pytest.param(
        kind(unit),
        marks=pytest.mark.skipif(lacking(kind, unit) is not None, reason=str(lacking(kind, unit))),
        id=f"{kind.__name__}-{unit.name}",
    )
    for kind, unit in pairs_of(KINDS, Bf16Unit)
]
each_kernel = pytest.mark.parametrize("kernel", KERNELS_OF_UNITS)


def two_four(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return TWO_FOUR.project(torch.randn(rows, columns, generator=generator)).to(BF16)


def packed(kernel: Bf16Kernel, weight: Tensor) -> tuple[Tensor, ...]:
    rows, columns = weight.shape
    spec = LinearSpec(rows, columns, BF16, CPU, two_four=True)
    return kernel.pack(LoadedWeight((RowBlock("m", pack24(weight)),)), spec)


def multiply(
    kernel: Bf16Kernel, weight: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> Tensor:
    return kernel.matmul(packed(kernel, weight), inputs, bias, len(weight))


def assert_product(
    kernel: Bf16Kernel, weight: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> None:
    """Compare with float64 within the bound of float32 sums, and one rounding of the result."""
    found = multiply(kernel, weight, inputs, bias)
    assert found.dtype == BF16
    w, x = weight.double(), inputs.double()
    exact, size = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    terms = weight.shape[1] + 1
    bound = terms * 2.0**-24 * size + torch.finfo(BF16).eps * exact.abs()
    # Numbers below the smallest normal one count as zero: inputs, weights, products and sums.
    lost = x.abs().sum(dim=1, keepdim=True) + w.abs().sum(dim=1) + 2 * terms
    bound += torch.finfo(BF16).tiny * lost
    assert bool(((found.double() - exact).abs() <= bound).all())


@each_kernel
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 23, 40, 300])
def test_products_are_right_in_every_batch(kernel: Bf16Kernel, batch: int) -> None:
    weight = two_four(72, 1572)
    inputs, bias = torch.randn(batch, 1572).to(BF16), torch.randn(72).to(BF16)
    assert_product(kernel, weight, inputs)
    assert_product(kernel, weight, inputs, bias)


@each_kernel
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 150),
    batch=st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_products_are_right_for_odd_shapes(
    *, kernel: Bf16Kernel, rows: int, groups: int, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(batch, 4 * groups, generator=generator).to(BF16)
    assert_product(kernel, two_four(rows, 4 * groups, seed=seed), inputs)


@pytest.mark.parametrize("unit", own_units())
@pytest.mark.parametrize("columns", [1, 2, 3, 33, 95])
def test_a_dense_weight_may_have_any_number_of_columns(unit: Bf16Unit, columns: int) -> None:
    weight, inputs = torch.randn(40, columns).to(BF16), torch.randn(11, columns).to(BF16)
    spec = LinearSpec(40, columns, BF16, CPU, two_four=False)
    panels = CpuBf16Dense(unit).pack(LoadedWeight((RowBlock("m", weight),)), spec)
    found = CpuBf16Dense(unit).matmul(panels, inputs, None, 40)
    torch.testing.assert_close(found, (inputs.double() @ weight.double().T).to(BF16))


@each_kernel
def test_every_place_and_value_is_found(kernel: Bf16Kernel) -> None:
    weight = two_four(50, 68)
    assert torch.equal(multiply(kernel, weight, torch.eye(68).to(BF16)).T, weight)


@each_kernel
def test_cancellation_zeros_and_denormals_stay_within_the_bound(kernel: Bf16Kernel) -> None:
    weight = two_four(32, 64).float()
    weight[0] = 0
    weight[1] *= 1e-6
    weight[2] = weight[2].abs() * 1e4
    weight[3] *= 1e-39
    inputs = torch.randn(12, 64)
    inputs[0] = torch.where(torch.arange(64) % 2 == 0, 1e6, -1e6)
    inputs[1] *= 1e-40
    inputs[2] = 0
    inputs[3] *= 1e-20
    assert_product(kernel, weight.to(BF16), inputs.to(BF16))


@each_kernel
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("batch", [1, 9])
def test_what_is_not_finite_reaches_the_outputs_that_keep_its_weight(
    kernel: Bf16Kernel, value: float, batch: int
) -> None:
    weight = two_four(40, 32)
    inputs = torch.randn(batch, 32).to(BF16)
    clean = multiply(kernel, weight, inputs)
    inputs[0, 5] = value
    found = multiply(kernel, weight, inputs)
    kept = weight[:, 5] != 0
    wanted = (torch.tensor(value) * weight[kept, 5].sign().float()).to(BF16)
    torch.testing.assert_close(found[0, kept], wanted, rtol=0, atol=0, equal_nan=True)
    # Elsewhere a kernel may or may not multiply it by a zero.
    assert bool((found[0, ~kept].isnan() | (found[0, ~kept] == clean[0, ~kept])).all())
    assert torch.equal(found[1:], clean[1:])


@each_kernel
@pytest.mark.parametrize("batch", [3, 40])
def test_the_number_of_threads_changes_no_bit(kernel: Bf16Kernel, batch: int) -> None:
    weight, inputs = two_four(200, 2304), torch.randn(batch, 2304).to(BF16)
    tensors, threads = packed(kernel, weight), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            found.append(kernel.matmul(tensors, inputs, None, 200))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@each_kernel
def test_a_token_has_the_same_bits_in_every_batch(kernel: Bf16Kernel) -> None:
    if isinstance(kernel, CpuBf16Tiles):
        pytest.skip("a matrix unit adds up a lone tile in another order")
    weight, inputs = two_four(64, 1600), torch.randn(300, 1600).to(BF16)
    tensors = packed(kernel, weight)
    whole = kernel.matmul(tensors, inputs, None, 64)
    for first, batch in ((0, 1), (3, 2), (7, 5), (100, 8), (40, 9), (200, 31)):
        part = kernel.matmul(tensors, inputs[first : first + batch], None, 64)
        assert torch.equal(part, whole[first : first + batch])


@pytest.mark.parametrize("kind", KINDS)
def test_the_vector_unit_gives_the_bits_of_plain_code(kind: Callable[..., Bf16Kernel]) -> None:
    if reason := lacking(kind, Bf16Unit.AVX512_BF16):
        pytest.skip(reason)
    weight, bias = two_four(100, 900), torch.randn(100).to(BF16)
    inputs = torch.randn(21, 900).to(BF16)
    plain = multiply(kind(Bf16Unit.PORTABLE), weight, inputs, bias)
    assert torch.equal(multiply(kind(Bf16Unit.AVX512_BF16), weight, inputs, bias), plain)


@each_kernel
def test_inputs_and_bias_need_not_be_contiguous(kernel: Bf16Kernel) -> None:
    weight = two_four(40, 64)
    inputs, bias = torch.randn(64, 12).to(BF16).T, torch.randn(80).to(BF16)[::2]
    assert_product(kernel, weight, inputs, bias)


def test_they_read_the_panels_of_the_kernels_of_float32_sums() -> None:
    weight = two_four(70, 100)
    spec = LinearSpec(70, 100, BF16, CPU, two_four=True)
    loaded = LoadedWeight((RowBlock("m", pack24(weight)),))
    for own, other in ((CpuBf16(), CpuDirect()), (CpuBf16Dense(), CpuDense())):
        assert own.layout == other.layout
        assert torch.equal(own.pack(loaded, spec)[0], other.pack(loaded, spec)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (torch.ones(1, 31, dtype=BF16), 64),
        (torch.ones(1, 65, dtype=BF16), 64),
        (torch.ones(64, dtype=BF16), 64),
        (torch.ones(1, 64), 64),
        (torch.ones(1, 64, dtype=torch.float16), 64),
        (torch.ones(1, 64, dtype=BF16), 65),
        (torch.ones(1, 64, dtype=BF16), 32),
        (torch.ones(1, 64, dtype=BF16, device="meta"), 64),
    ],
    ids=["narrow", "wide", "flat", "float32", "float16", "more rows", "fewer rows", "device"],
)
def test_operands_that_do_not_fit_never_reach_native_code(
    kind: Callable[..., Bf16Kernel], inputs: Tensor, rows: int
) -> None:
    kernel = kind(Bf16Unit.PORTABLE)
    tensors = packed(kernel, two_four(64, 64))
    with pytest.raises(ValueError, match=r"inputs|rows"):
        kernel.matmul(tensors, inputs, None, rows)
    good = torch.ones(1, 64, dtype=BF16)
    for damaged in (tensors[0].transpose(0, 1), tensors[0][:, :, 1:].contiguous(), tensors[0][0]):
        with pytest.raises(ValueError, match="panels"):
            kernel.matmul((damaged,), good, None, 64)
    for bias in (torch.ones(63), torch.ones(64, device="meta")):
        with pytest.raises(ValueError, match="bias of shape"):
            kernel.matmul(tensors, good, bias, 64)


def test_layers_that_they_cannot_run_are_refused_with_the_reason() -> None:
    spec = LinearSpec(8, 8, torch.float32, CPU, two_four=True)
    assert KERNELS["cpu_bf16"].unsupported(spec) == "multiplies bfloat16, not float32"
    spec = LinearSpec(8, 8, BF16, torch.device("cuda"), two_four=True)
    assert KERNELS["cpu_bf16"].unsupported(spec) == "runs on a CPU, not on cuda"
    spec = LinearSpec(8, 8, BF16, CPU, two_four=True)
    assert KERNELS["cpu_bf16_dense"].unsupported(spec) == "every module of the layer is 2:4"
    mixed = LinearSpec(8, 8, BF16, CPU, two_four=False)
    assert KERNELS["cpu_bf16"].unsupported(mixed) == "a module of the layer is dense"
    reason = "this processor has no AVX-512 with BF16" if len(own_units()) < 2 else None
    assert KERNELS["cpu_bf16"].unsupported(spec) == reason
    assert KERNELS["cpu_bf16_dense"].unsupported(mixed) == reason


@pytest.mark.parametrize(
    ("tiles", "reason"),
    [
        (Tiles.READY, None),
        (Tiles.MISSING, "this processor has no AMX"),
        (Tiles.REFUSED, "the operating system does not let this process use AMX"),
    ],
)
def test_the_matrix_unit_is_left_alone_where_it_may_not_be_used(
    monkeypatch: pytest.MonkeyPatch, tiles: Tiles, reason: str | None
) -> None:
    own = replace(native_library(), bf16_units=tuple(Bf16Unit), tiles=tiles)
    monkeypatch.setattr(bf16_kernels, "native_library", lambda: own)
    spec = LinearSpec(8, 8, BF16, CPU, two_four=True)
    assert CpuBf16Tiles().unsupported(spec) == reason
    assert CpuBf16Tiles().unsupported(replace(spec, dtype=torch.float32)) is not None


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """Return a library whose vector unit restores tiles and leaves them to plain code."""
    if shutil.which("g++") is None or Bf16Unit.AVX512_BF16 not in own_units():
        pytest.skip("no g++ or no AVX-512 with BF16")
    built = tmp_path_factory.mktemp("emulated") / "emulated.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DSPARSESERVE_PLAIN_TILES"]
    sources = NATIVE.glob("*.cpp")
    subprocess.run(["g++", *options, "-o", built, *sources], check=True, capture_output=True)
    handle = ctypes.CDLL(str(built))
    handle.sparseserve_bf16.argtypes = [ctypes.c_char_p]
    assert Tiles(handle.sparseserve_tiles()) is Tiles.READY
    return replace(native_library(), handle=handle)


def test_tiles_restored_by_the_vector_unit_are_right_when_multiplied_by_plain_code(
    emulated: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16_kernels, "native_library", lambda: emulated)
    for rows, columns in ((1, 4), (40, 156), (72, 1572)):
        weight, bias = two_four(rows, columns), torch.randn(rows).to(BF16)
        for batch in (1, 2, 15, 16, 17, 32, 33, 48, 300):
            inputs = torch.randn(batch, columns).to(BF16)
            assert_product(CpuBf16Tiles(), weight, inputs, bias)
            plain = multiply(CpuBf16Tiles(Bf16Unit.PORTABLE), weight, inputs, bias)
            assert torch.equal(multiply(CpuBf16Tiles(), weight, inputs, bias), plain)
