"""The int8 kernel against sums of integers, to the bit, on every vector unit of this machine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.checkpoint.packed24 import pack24
from sparseserve.serving.kernels.cpu import int8_kernels
from sparseserve.serving.kernels.cpu.int8_kernels import CpuInt8
from sparseserve.serving.kernels.cpu.int8_layout import int8_panels, int8_product
from sparseserve.serving.kernels.cpu.library import (
    Int8Unit,
    NativeLibrary,
    Tiles,
    Unit,
    missing_library,
    native_library,
)
from sparseserve.sparsity import TWO_FOUR

NATIVE = Path(__file__).parents[3] / "serving" / "kernels" / "cpu" / "native"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


def own_units() -> tuple[Int8Unit, ...]:
    return () if missing_library() else native_library().int8_units


UNITS = [
    pytest.param(
        unit,
        marks=pytest.mark.skipif(
            unit not in own_units(), reason=f"this processor has no {unit.name}"
        ),
        id=unit.name,
    )
    for unit in Int8Unit
]


def codes(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Return dense int8 codes in 2:4, of which some groups keep fewer than two."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-127, 128, (rows, columns), generator=generator)
    thinned = drawn * (torch.rand(rows, columns, generator=generator) < 0.7)
    return TWO_FOUR.project(thinned.float()).to(torch.int8)


def row_scales(rows: int) -> Tensor:
    return 0.001 + 0.01 * torch.rand(rows, generator=torch.Generator().manual_seed(rows))


def activations(batch: int, columns: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-3, 4, (batch, 1), generator=generator)
    return torch.randn(batch, columns, generator=generator) * sizes


def product(
    unit: Int8Unit, weight: Tensor, scale: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> Tensor:
    packed = (int8_panels(pack24(weight)), scale)
    return CpuInt8(unit).matmul(packed, inputs, bias, len(weight))


def expected(weight: Tensor, scale: Tensor, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """Quantize token by token and add up integers."""
    outputs = []
    for token in inputs.float():
        largest = token.abs().max()
        if not largest.isfinite():
            outputs.append(torch.full((len(weight),), torch.nan))
            continue
        own = largest / 127 if largest > 0 else torch.tensor(1.0)
        numbers = torch.round(token / own).clamp(-127, 127).to(torch.int32)
        sums = (weight.to(torch.int32) * numbers).sum(dim=1, dtype=torch.int32)
        output = sums.float() * own * scale
        outputs.append(output if bias is None else output + bias.float())
    if not outputs:
        return inputs.new_empty(0, len(weight))
    return torch.stack(outputs).to(inputs.dtype)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33, 257])
def test_products_are_exact_in_every_dtype_and_batch(
    unit: Int8Unit, dtype: torch.dtype, batch: int
) -> None:
    weight, scale = codes(72, 156), row_scales(72)
    inputs, bias = activations(batch, 156).to(dtype), torch.randn(72).to(dtype)
    assert_same(product(unit, weight, scale, inputs), expected(weight, scale, inputs))
    assert_same(product(unit, weight, scale, inputs, bias), expected(weight, scale, inputs, bias))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("columns", [4, 8, 12, 516, 576, 1536])
@pytest.mark.parametrize("rows", [1, 31, 32, 33])
def test_products_are_exact_for_models_and_remainders(
    unit: Int8Unit, rows: int, columns: int
) -> None:
    weight, scale = codes(rows, columns), row_scales(rows)
    for batch in (1, 11):
        inputs = activations(batch, columns)
        assert_same(product(unit, weight, scale, inputs), expected(weight, scale, inputs))


@pytest.mark.parametrize("unit", UNITS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 150),
    batch=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_products_are_exact_for_odd_shapes(
    *, unit: Int8Unit, rows: int, groups: int, batch: int, dtype: torch.dtype, seed: int
) -> None:
    weight, scale = codes(rows, 4 * groups, seed=seed), row_scales(rows)
    inputs = activations(batch, 4 * groups, seed=seed).to(dtype)
    assert_same(product(unit, weight, scale, inputs), expected(weight, scale, inputs))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("columns", [8, 4096])
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_the_largest_codes_and_activations_do_not_saturate(
    unit: Int8Unit, columns: int, batch: int
) -> None:
    weight = (
        torch.tensor([127, 127, 0, 0, 0, -127, 0, -127]).to(torch.int8).repeat(40, columns // 8)
    )
    weight[1::2] *= -1
    for inputs in (torch.ones(batch, columns), weight[:1].sign().float().repeat(batch, 1)):
        for sign in (1, -1):
            found = product(unit, weight, torch.ones(40), sign * inputs)
            assert_same(found, expected(weight, torch.ones(40), sign * inputs))
    assert_same(
        found[:, 0], torch.full((batch,), -127.0 * 127 * (columns // 2)) * torch.tensor(1 / 127)
    )


@pytest.mark.parametrize("unit", UNITS)
def test_every_place_and_code_is_found(unit: Int8Unit) -> None:
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    weight = torch.zeros(6 * 37, 2, 4, dtype=torch.int8)
    for row, place in enumerate(pairs * 37):
        weight[row, 0, list(place)] = torch.tensor([row - 111, 111 - row]).to(torch.int8)
        weight[row, 1, list(place)] = torch.tensor([-127, row % 128]).to(torch.int8)
    weight = weight.reshape(-1, 8)
    rows = product(unit, weight, torch.ones(len(weight)), 127 * torch.eye(8))
    assert torch.equal(rows.T, 127.0 * weight)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [4, 20])
def test_only_the_tokens_with_nan_or_infinity_become_nan(
    unit: Int8Unit, dtype: torch.dtype, batch: int
) -> None:
    weight, scale = codes(40, 64), row_scales(40)
    inputs = activations(batch, 64).clamp(-1e4, 1e4).to(dtype)
    inputs[0, 3], inputs[1, 63], inputs[2, 0] = torch.nan, torch.inf, -torch.inf
    found = product(unit, weight, scale, inputs, torch.ones(40, dtype=dtype))
    assert bool(found[:3].isnan().all())
    assert bool(found[3:].isfinite().all())
    assert_same(found[3:], expected(weight, scale, inputs[3:], torch.ones(40)))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_denormal_tokens_are_exact(unit: Int8Unit, dtype: torch.dtype) -> None:
    weight, scale = codes(40, 64), row_scales(40)
    inputs = torch.zeros(5, 64)
    inputs[1, 5] = 1e-45
    inputs[2] = 1e-43 * torch.randn(64)
    inputs[3] = 1e-40 * torch.randn(64)
    inputs = inputs.to(dtype)
    inputs[4] = torch.finfo(dtype).max
    found = product(unit, weight, scale, inputs)
    assert bool((found[0] == 0).all())
    assert_same(found, expected(weight, scale, inputs))


@pytest.mark.parametrize("unit", UNITS)
def test_halves_are_rounded_to_even(unit: Int8Unit) -> None:
    weight = torch.zeros(1, 8, dtype=torch.int8)
    weight[0, 0] = 1
    for value, rounded in [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-126.5, -126)]:
        inputs = torch.tensor([[value, 0, 0, 0, 0, 0, 0, 127.0]])
        assert product(unit, weight, torch.ones(1), inputs).item() == rounded


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_number_of_threads_changes_no_bit(unit: Int8Unit, batch: int) -> None:
    weight, scale, inputs = codes(200, 576), row_scales(200), activations(batch, 576)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            found.append(product(unit, weight, scale, inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("unit", UNITS)
def test_inputs_and_bias_need_not_be_contiguous(unit: Int8Unit) -> None:
    weight, scale = codes(40, 64), row_scales(40)
    inputs, bias = activations(64, 12).T, torch.randn(80)[::2]
    assert_same(product(unit, weight, scale, inputs, bias), expected(weight, scale, inputs, bias))


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_gives_the_same_bits(unit: Int8Unit, dtype: torch.dtype) -> None:
    weight, scale, bias = codes(70, 132), row_scales(70), torch.randn(70).to(dtype)
    inputs = activations(12, 132).to(dtype)
    inputs[2], inputs[5, 1] = 0, torch.nan
    plain = int8_product(pack24(weight), scale, inputs, bias)
    assert_same(product(unit, weight, scale, inputs, bias), plain)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    """Return a library in which AVX2 does what AVX-VNNI and AVX-512 would."""
    if shutil.which("g++") is None or Int8Unit.AVX2 not in own_units():
        pytest.skip("no g++ or no AVX2")
    folder = tmp_path_factory.mktemp("emulated")
    sources = [NATIVE / "library.cpp", NATIVE / "portable.cpp", NATIVE / "avx2.cpp"]
    sources += [NATIVE / "avx512.cpp", NATIVE / "bf16_portable.cpp", NATIVE / "bf16_avx512.cpp"]
    sources += [NATIVE / "int8_portable.cpp", NATIVE / "int8_avx2.cpp"]
    for name in ("int8_avx_vnni.cpp", "int8_avx512_vnni.cpp"):
        text = (NATIVE / name).read_text()
        for unit in ("avx2,avxvnni", "avx512f,avx512bw,avx512vnni"):
            text = text.replace(f'#pragma GCC target("{unit}")', '#pragma GCC target("avx2")')
        header = Path(__file__).with_name("emulated_vnni.h")
        (folder / name).write_text(f'#include "{header}"\n{text}')
        sources.append(folder / name)
    built = folder / "emulated.so"
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-psabi", f"-I{NATIVE}"]
    subprocess.run(["g++", *options, "-o", built, *sources], check=True, capture_output=True)
    handle = ctypes.CDLL(str(built))
    handle.sparseserve_int8.argtypes = [ctypes.c_char_p]
    return NativeLibrary(handle, Unit.PORTABLE, None, tuple(Int8Unit), (), Tiles.MISSING)


@pytest.mark.parametrize("unit", [Int8Unit.AVX_VNNI, Int8Unit.AVX512_VNNI], ids=lambda u: u.name)
def test_units_that_this_processor_lacks_are_exact_when_emulated(
    unit: Int8Unit, emulated: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_kernels, "native_library", lambda: emulated)
    for rows, columns in ((1, 4), (40, 156), (72, 516)):
        weight, scale = codes(rows, columns), row_scales(rows)
        for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9, 23):
            for dtype in (torch.float32, torch.bfloat16):
                inputs = activations(batch, columns).to(dtype)
                assert_same(product(unit, weight, scale, inputs), expected(weight, scale, inputs))
