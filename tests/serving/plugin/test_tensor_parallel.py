"""Tiny models under a real vLLM of two processes, each of which holds its share of every layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.exporters import export_dense, export_packed24
from sparseserve.serving.kernels.cpu.library import missing_library
from tests.selection import representatives, selected
from tests.serving.plugin.engines import (
    Case,
    Served,
    require_what_transformers_computes,
    serve_all,
)

pytest.importorskip("vllm")
CORES = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(CORES) < 2, reason="vLLM binds each of two processes to a core"),
]

RANKS = {"tensor_parallel_size": 2}
DENSE = "llama, dense 2:4"
INT4 = "llama, int4"
FAMILIES = ("llama", "mixtral", "granitemoehybrid")


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest,
    two_four_folder: Callable[..., Path],
    pack_folder: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Served]:
    wanted = selected(request, "case")
    dense = {
        family: two_four_folder(family)
        for family in FAMILIES
        if any(case.startswith(family) for case in wanted)
    }
    cases = {
        family: Case(folder, pack_folder(folder), options=RANKS) for family, folder in dense.items()
    }
    if DENSE in wanted:
        cases[DENSE] = Case(dense["llama"], dense["llama"], "sparseserve", options=RANKS)
    if INT4 in wanted:
        place = tmp_path_factory.mktemp("int4")
        codes = export_packed24(
            Artifact.open(dense["llama"]),
            place / "packed",
            quantization=Quantization(to="int4", group_size=32),
        )
        cases[INT4] = Case(export_dense(codes, place / "dense").path, codes.path, options=RANKS)
    return serve_all(
        cases,
        tmp_path_factory.mktemp("jobs"),
        # A core for each process, whatever NUMA nodes there are. And vLLM sends its processes no
        # function, such as that which asks for their kernels, unless it is told to.
        VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, CORES)),
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )


@pytest.mark.parametrize("case", representatives((*FAMILIES, DENSE, INT4), ("llama", "mixtral")))
def test_two_processes_compute_what_transformers_computes(
    served: dict[str, Served], case: str
) -> None:
    require_what_transformers_computes(served[case])
    layers = served[case].result["layers"]
    assert any(name.endswith("qkv_proj") for name in layers), layers
    if case == "mixtral" and missing_library() is None:
        assert any(name.endswith("experts.w13") for name in layers), layers
