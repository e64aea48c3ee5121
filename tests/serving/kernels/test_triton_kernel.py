"""The Triton kernels without a card: numerics in the interpreter, and compiled for each card."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparseserve.serving.kernels.cuda.table import CUDA_KERNELS
from sparseserve.serving.kernels.cuda.tiling import BATCH_TILES, Tiling, batch_tile, split_count
from sparseserve.serving.kernels.cuda.triton_packed import TritonKernel, TritonVectorKernel

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
# Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide,
# technical specifications): KiB.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
SHAPES = {
    name: Tiling(8, kernel.tile_rows, kernel.tile_columns, 1, kernel.warps, kernel.stages)
    for name, kernel in CUDA_KERNELS.items()
    if isinstance(kernel, TritonKernel) and not isinstance(kernel, TritonVectorKernel)
}
VECTOR = TritonVectorKernel()

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("examples", "cases"),
    [("10", "not further"), pytest.param("60", "", marks=pytest.mark.further)],
    ids=["some", "all"],
)
def test_numerics_hold_in_tritons_interpreter(
    pytestconfig: pytest.Config, examples: str, cases: str
) -> None:
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "INTERPRETED_EXAMPLES": examples}
    environment = {**os.environ, **settings}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    command += ["-m", cases]
    run = subprocess.run(
        command,
        env=environment,
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^\d+ passed", run.stdout, re.MULTILINE), run.stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(
    capability: int,
    function: object,
    pointers: dict[str, str],
    constants: dict[str, object],
    options: dict[str, int],
) -> object:
    """Compile ahead of time; every integer but the batch is a multiple of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names  # type: ignore[attr-defined]  # a JITFunction
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    aligned = [i for i, name in enumerate(names) if name not in constants and name != "batch"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_product(
    capability: int, dtype: str, tiling: Tiling, *, partial: bool = False
) -> object:
    from sparseserve.serving.kernels.cuda.triton_product import product_kernel, vector_kernel

    pointers = {
        "inputs": f"*{dtype}",
        "pairs": "*i32",
        "codes": "*u8",
        "bias": f"*{dtype}",
        "output": "*fp32" if partial else f"*{dtype}",
    }
    constants: dict[str, object] = {
        "HAS_BIAS": not partial,
        "IS_PARTIAL": partial,
        "TILE_ROWS": tiling.rows,
        "TILE_COLUMNS": tiling.columns,
    }
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if tiling.batch == 1:
        return compile_for(capability, vector_kernel, pointers, constants, options)
    constants["TILE_BATCH"] = tiling.batch
    return compile_for(capability, product_kernel, pointers, constants, options)


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_decoding_runs_on_the_tensor_cores_of_every_card(capability: int) -> None:
    compiled = compile_product(capability, "bf16", SHAPES["triton"])
    assembly = compiled.asm["ptx"]  # type: ignore[attr-defined]
    assert ("wgmma.mma_async" if capability >= 90 else "mma.sync.aligned.m16n8k16") in assembly
    assert compiled.asm["cubin"]  # type: ignore[attr-defined]
    # Weights come as whole 16-byte vectors, ahead of their use.
    assert "cp.async.cg.shared.global" in assembly
    # Nothing is spilled to slow memory.
    assert ".local" not in assembly


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("side", [BATCH_TILES[0], BATCH_TILES[-1]])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tile_fits_the_smallest_card(name: str, side: int, partial: bool) -> None:
    tile = SHAPES[name]
    tiling = Tiling(side, tile.rows, tile.columns, 1, tile.warps, tile.stages)
    compiled = compile_product(86, "fp16", tiling, partial=partial)
    assert compiled.metadata.shared <= SHARED_KIB[86] * 1024  # type: ignore[attr-defined]
    assert "mma.sync.aligned.m16n8k16" in compiled.asm["ptx"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_one_input_needs_no_tensor_cores_and_reads_whole_vectors(
    capability: int, partial: bool
) -> None:
    tiling = Tiling(1, VECTOR.tile_rows, VECTOR.tile_columns, 1, VECTOR.warps, VECTOR.stages)
    compiled = compile_product(capability, "bf16", tiling, partial=partial)
    assembly = compiled.asm["ptx"]  # type: ignore[attr-defined]
    assert compiled.asm["cubin"]  # type: ignore[attr-defined]
    assert "mma" not in assembly
    assert "ld.global.v4.b32" in assembly
    assert ".local" not in assembly
    # Inputs change places between threads in one exchange, and sums in another.
    assert assembly.count("bar.sync") <= 6


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_summing_splits_and_unpacking_compile_for_every_card(capability: int) -> None:
    from sparseserve.serving.kernels.cuda.triton_launch import SUM_TILE, UNPACK_TILE
    from sparseserve.serving.kernels.cuda.triton_product import sum_kernel, unpack_kernel

    compiled = [
        compile_for(
            capability,
            sum_kernel,
            {"shares": "*fp32", "bias": "*bf16", "output": "*bf16"},
            {"HAS_BIAS": True, "SPLITS": 4, "TILE": SUM_TILE},
            {"num_warps": 4},
        ),
        compile_for(
            capability,
            unpack_kernel,
            {"pairs": "*i32", "codes": "*u8", "output": "*bf16"},
            {"TILE_ROWS": UNPACK_TILE[0], "TILE_COLUMNS": UNPACK_TILE[1]},
            {"num_warps": 4},
        ),
    ]
    assert all(one.asm["cubin"] for one in compiled)  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 64, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (192, 576), (28672, 8192), (8, 4)])
def test_splits_leave_every_program_something_to_do(batch: int, rows: int, columns: int) -> None:
    tile = Tiling(batch_tile(batch))
    assert tile.batch >= min(batch, BATCH_TILES[-1])
    splits = split_count(batch, rows, columns, tile=tile, processors=108)
    assert 1 <= splits <= max(1, columns // tile.columns)


def test_few_rows_are_split_until_the_device_is_full() -> None:
    tile = Tiling(8)
    assert split_count(1, 1024, 4096, tile=tile, processors=108) > 1
    assert split_count(1, 28672, 4096, tile=tile, processors=108) == 1


def test_shares_too_many_to_address_are_not_made() -> None:
    many = Tiling(64, 64, 32)
    processors = 10**9
    assert split_count(2**16, 2**13, 2**13, tile=many, processors=processors) == 1


def test_importing_all_kernels_does_not_import_triton() -> None:
    command = (
        "import sys, sparseserve.serving.kernels.cuda.table\n"
        "sys.exit('triton.language' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
