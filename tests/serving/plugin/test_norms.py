"""vLLM's fused norms on a CPU: chosen for models of ours, and right wherever they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm")

from vllm import ir
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from sparseserve.serving.plugin.norms import PROVIDER, use_fused_norms

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM runs on a GPU here")

NORMS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def own_priorities() -> Iterator[None]:
    with NORMS[0].set_priority(["native"]), NORMS[1].set_priority(["native"]):
        yield


def engine(
    mode: CompilationMode | None = CompilationMode.NONE, wanted: tuple[str, ...] = ("native",)
) -> Any:
    priority = SimpleNamespace(rms_norm=list(wanted), fused_add_rms_norm=["native"])
    return SimpleNamespace(
        compilation_config=SimpleNamespace(mode=mode),
        kernel_config=SimpleNamespace(ir_op_priority=priority),
    )


def priorities() -> list[list[str]]:
    return [norm.get_priority() for norm in NORMS]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_an_engine_that_runs_eagerly_takes_them() -> None:
    assert use_fused_norms(engine())
    assert priorities() == [[PROVIDER, "native"]] * 2


@pytest.mark.parametrize(
    "other",
    [engine(CompilationMode.VLLM_COMPILE), engine(wanted=("oink", "native"))],
    ids=["compiled", "chosen by the user"],
)
def test_other_engines_are_left_as_they_are(other: Any) -> None:
    for norm in NORMS:
        norm.set_default(["native"])
    assert not use_fused_norms(other)
    assert priorities() == [["native"]] * 2


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    width=st.sampled_from([32, 64, 96, 576, 4096]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_they_are_what_vllm_computes_without_them(
    tokens: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    x, residual = draw((tokens, width), dtype, seed), draw((tokens, width), dtype, seed + 1)
    weight = draw((width,), dtype, seed + 2)
    native, fused = (ir.ops.rms_norm.impls[name] for name in ("native", PROVIDER))
    limit = 4 * torch.finfo(dtype).eps
    wanted = native.impl_fn(x.clone(), weight, 1e-5)
    assert fused.supports_args(x, weight, 1e-5)
    torch.testing.assert_close(
        fused.impl_fn(x.clone(), weight, 1e-5), wanted, rtol=limit, atol=limit
    )
    native, fused = (ir.ops.fused_add_rms_norm.impls[name] for name in ("native", PROVIDER))
    assert fused.supports_args(x, residual, weight, 1e-5)
    # A sum that was rounded is normed here, one that was not there.
    limit *= 2
    for own, other in zip(
        fused.impl_fn(x.clone(), residual.clone(), weight, 1e-5),
        native.impl_fn(x.clone(), residual.clone(), weight, 1e-5),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    ("x", "weight", "size"),
    [
        (torch.ones(2, 30), torch.ones(30), None),
        (torch.ones(2, 128)[:, :64], torch.ones(64), None),
        (torch.ones(2, 64).bfloat16(), torch.ones(64), None),
        (torch.ones(2, 64), None, None),
        (torch.ones(2, 64), torch.ones(64), 32),
    ],
    ids=["odd width", "not contiguous", "another dtype", "no weight", "a part of the features"],
)
def test_what_they_cannot_do_is_left_to_vllm(
    x: Tensor, weight: Tensor | None, size: int | None
) -> None:
    assert not ir.ops.rms_norm.impls[PROVIDER].supports_args(x, weight, 1e-5, size)
    fused = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    assert not fused.supports_args(x, x.clone(), weight, 1e-5, size)


def test_a_residual_of_another_kind_is_left_to_vllm() -> None:
    fused = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    x, weight = torch.ones(2, 64), torch.ones(64)
    for residual in (torch.ones(2, 64).bfloat16(), torch.ones(64, 2).T):
        assert not fused.supports_args(x, residual, weight, 1e-5)
