"""The two engines that can evaluate a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate


@pytest.mark.vllm
def test_vllm_finds_in_the_packed_checkpoint_what_transformers_finds_in_the_dense_one(
    prune: Callable[..., Artifact],
) -> None:
    dense = prune("llama", "dense", export_format="dense")
    packed = prune("llama", "packed")
    heard: list[tuple[int, int]] = []
    expected = evaluate(str(dense.path), EvaluationSpec(samples=3, sequence_length=64))
    found = evaluate(
        str(packed.path),
        EvaluationSpec(samples=3, sequence_length=64, backend="vllm"),
        on_window=lambda done, total: heard.append((done, total)),
    )
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found.tokens == expected.tokens == 3 * 63
    assert found.dtype == expected.dtype
    assert heard == [(1, 3), (2, 3), (3, 3)]
