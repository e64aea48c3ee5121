"""Which layers the int8 kernel takes, what it refuses, and that no other computes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24, pack24, unpack24
from sparseserve.checkpoint.quantized24 import Quantized24
from sparseserve.errors import ServingError
from sparseserve.serving.kernels import (
    KERNELS,
    LinearSpec,
    LoadedWeight,
    RowBlock,
    layer_kernels,
    two_four_linear,
)
from sparseserve.serving.kernels.cpu.int8_kernels import CpuInt8, int8_unsupported
from sparseserve.serving.kernels.cpu.int8_layout import int8_panels, int8_product
from sparseserve.serving.kernels.cpu.library import missing_library, native_library
from sparseserve.sparsity import TWO_FOUR

CPU = torch.device("cpu")
SPEC = LinearSpec(48, 64, torch.bfloat16, CPU, two_four=True, quantized="int8")

needs_library = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))


def quantized(rows: int, columns: int = 64, *, seed: int = 0) -> Quantized24:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-127, 128, (rows, columns), generator=generator).float()
    codes = pack24(TWO_FOUR.project(drawn).to(torch.int8))
    scale = 0.01 * torch.rand(rows, 1, generator=generator) + 0.001
    return Quantized24(codes, scale, torch.bfloat16)


@needs_library
def test_a_layer_in_int8_runs_on_the_int8_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSESERVE_KERNELS", raising=False)
    weight = quantized(48)
    loaded = LoadedWeight((RowBlock("m", weight),))
    chosen = layer_kernels(SPEC, loaded, tell=pytest.fail)
    assert {chosen.kernel(batch) for batch in (1, 16, 5000)} == {"cpu_int8"}
    assert not chosen.times, "there is nothing to choose from"
    assert chosen.layer == "48 x 64 bfloat16 in int8"
    assert chosen.refusals["dense"] == "the layer computes in int8"
    assert set(chosen.refusals) == set(KERNELS) - {"cpu_int8"}
    inputs = torch.randn(3, 64).bfloat16()
    found = two_four_linear(inputs, chosen.packed, None, str(chosen.plan), 48)
    assert torch.equal(found, int8_product(weight.codes, weight.scale[:, 0], inputs, None))


def test_every_other_kernel_refuses_a_layer_that_computes_in_int8() -> None:
    for name, kernel in KERNELS.items():
        if name != "cpu_int8":
            assert kernel.unsupported(SPEC) is not None, name
    for name in ("cpu_direct", "cpu_unpacked", "cpu_dense", "cpu_bf16", "triton", "dense"):
        assert KERNELS[name].unsupported(SPEC) == "the layer computes in int8"


def test_the_int8_kernel_refuses_other_layers() -> None:
    kernel = CpuInt8()
    assert kernel.unsupported(replace(SPEC, quantized=None)) == "the weight is not int8"
    assert kernel.unsupported(replace(SPEC, two_four=False)) == "a module of the layer is dense"


@needs_library
def test_the_int8_kernel_takes_what_it_does_not_refuse() -> None:
    assert CpuInt8().unsupported(SPEC) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert int8_unsupported(CPU, 1, 4, dtype) is None
    # 133144 products of 127 and 127 are the most that fit.
    assert int8_unsupported(CPU, 8, 266288, torch.float32) is None


@pytest.mark.parametrize(
    ("device", "rows", "columns", "dtype", "reason"),
    [
        ("cuda", 8, 8, torch.float32, "runs on a CPU, not on cuda"),
        ("cpu", 8, 8, torch.float64, "does not know torch.float64"),
        ("cpu", 8, 6, torch.float32, "8 rows of 6 columns are no groups of 4"),
        ("cpu", 0, 8, torch.float32, "0 rows of 8 columns are no groups of 4"),
        ("cpu", 8, 266292, torch.float32, "266292 input features, at most 266288 fit"),
    ],
)
def test_what_no_int8_kernel_can_run_has_a_reason(
    device: str, rows: int, columns: int, dtype: torch.dtype, reason: str
) -> None:
    found = int8_unsupported(torch.device(device), rows, columns, dtype)
    assert found is not None
    assert found.startswith(reason)


def test_without_the_library_the_reason_is_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        reason = int8_unsupported(CPU, 8, 8, torch.float32)
    finally:
        native_library.cache_clear()
    assert reason is not None
    assert reason.startswith("the compiled kernels were not built")


@needs_library
def test_a_weight_takes_five_bits() -> None:
    panels, scale = CpuInt8().pack(LoadedWeight((RowBlock("m", quantized(64)),)), SPEC)
    assert panels.nbytes * 8 == 5 * 64 * 64
    assert scale.nbytes == 4 * 64


def test_modules_of_a_layer_are_joined_in_their_order() -> None:
    parts = [quantized(16, seed=1), quantized(32, seed=2)]
    loaded = LoadedWeight(tuple(RowBlock(f"m{i}", part) for i, part in enumerate(parts)))
    codes, scale = loaded.codes()
    rows = [unpack24(part.codes) for part in parts]
    assert torch.equal(unpack24(codes), torch.cat(rows))
    assert torch.equal(scale, torch.cat([part.scale[:, 0] for part in parts]))
    dense = [r.float() * part.scale for r, part in zip(rows, parts, strict=True)]
    assert torch.equal(loaded.dense(), torch.cat(dense).bfloat16())
    assert torch.equal(unpack24(loaded.packed()), loaded.dense())
    assert loaded.storage_dtype() == torch.bfloat16


def test_a_weight_that_is_not_in_codes_has_none() -> None:
    block = RowBlock("m", TWO_FOUR.project(torch.randn(4, 8)))
    with pytest.raises(ServingError, match="m: the weight is not int8"):
        LoadedWeight((RowBlock("n", quantized(4, 8)), block)).codes()


def test_damaged_codes_are_refused_by_name() -> None:
    weight = quantized(4, 8)
    damaged = Packed24(weight.codes.values, torch.zeros_like(weight.codes.indices))
    block = RowBlock("m", Quantized24(damaged, weight.scale, torch.float32))
    for part in (block.codes, block.packed, block.dense):
        with pytest.raises(ServingError, match=r"m\.weight_indices: indices at row 0"):
            part()


def test_codes_of_another_type_or_with_several_scales_a_row_are_no_int8_codes() -> None:
    weight = quantized(4, 8)
    floats = Packed24(weight.codes.values.float(), weight.codes.indices)
    for other in (
        Quantized24(floats, weight.scale, torch.float32),
        Quantized24(weight.codes, weight.scale.repeat(1, 2), torch.float32),
    ):
        with pytest.raises(ServingError, match="m: the weight is not int8"):
            RowBlock("m", other).codes()


def test_a_code_that_is_no_symmetric_number_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        int8_panels(Packed24(torch.full((1, 2), -128).to(torch.int8), torch.tensor([[4]]).byte()))


@needs_library
@pytest.mark.parametrize(
    ("inputs", "bias", "rows"),
    [
        (torch.ones(1, 56), None, 64),
        (torch.ones(1, 68), None, 64),
        (torch.ones(64), None, 64),
        (torch.ones(1, 64, dtype=torch.float64), None, 64),
        (torch.ones(1, 64, device="meta"), None, 64),
        (torch.ones(1, 64), None, 65),
        (torch.ones(1, 64), None, 63),
        (torch.ones(1, 64), torch.ones(63), 64),
    ],
    ids=["narrow", "wide", "flat", "float64", "device", "more rows", "fewer rows", "bias"],
)
def test_operands_that_do_not_fit_never_reach_native_code(
    inputs: Tensor, bias: Tensor | None, rows: int
) -> None:
    weight = quantized(64)
    panels, scale = int8_panels(weight.codes), weight.scale[:, 0]
    with pytest.raises(ValueError, match=r"inputs|rows|scale"):
        CpuInt8().matmul((panels, scale), inputs, bias, rows)
    for damaged in (panels.transpose(0, 1), panels[:, :, 1:].contiguous(), panels.char()):
        with pytest.raises(ValueError, match="panels"):
            CpuInt8().matmul((damaged, scale), torch.ones(1, 64), None, 64)
