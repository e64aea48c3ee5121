"""A family that was pruned can still be pruned: the committed sweep is what is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.served import TOLERANCE
from benchmarks.families.sweep import FAMILIES, Outcome, try_family
from benchmarks.harness.results import RESULTS, read_result
from tests.selection import representatives

ROWS: dict[str, dict[str, Any]] = {
    row["family"]: row for row in read_result(RESULTS / "families.json")["rows"]
}
PRUNED = [family for family, row in ROWS.items() if row["outcome"] == "pruned"]
# Layers of several classes with experts, arguments that depend on the tokens, and images.
REPRESENTATIVES = ("jamba", "gemma4_text", "mistral3")
# What people run in 2026, by transformers' names.
WANTED = (
    *("llama", "llama4_text", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text"),
    *("qwen3_5_moe_text", "gpt_oss", "gemma2", "gemma3_text", "gemma3", "gemma3n_text"),
    *("gemma4_text", "gemma4", "mistral", "ministral", "ministral3", "mixtral", "phi3", "phimoe"),
    *("glm4", "glm4_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "olmo2", "olmo3", "olmoe"),
    *("smollm3", "granite", "granitemoehybrid", "nemotron", "nemotron_h", "falcon_h1", "lfm2"),
    *("lfm2_moe", "kimi_linear", "minimax_m2", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense"),
    *("seed_oss", "exaone4", "cohere2", "starcoder2", "mamba2", "bamba", "jamba", "apertus"),
    *("mimo_v2_flash", "stablelm", "opt", "gpt2", "gpt_neox", "bitnet", "nanochat", "qwen3_5"),
    *("qwen3_5_moe", "llama4", "olmo_hybrid", "mistral3"),
)


def test_the_sweep_knows_every_family_of_the_installed_transformers() -> None:
    assert set(ROWS) == set(FAMILIES)


def test_what_people_run_is_pruned() -> None:
    assert [family for family in WANTED if family not in PRUNED] == []
    assert len(WANTED) >= 60


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", representatives(PRUNED, REPRESENTATIVES))
def test_a_family_that_was_pruned_still_is(family: str, tmp_path: Path) -> None:
    found = try_family(family, tmp_path)
    assert found.outcome == "pruned", found.reason
    assert found.operators >= ROWS[family]["operators"]
    assert found.of_experts >= ROWS[family]["of_experts"]


def test_a_refusal_is_one_line_with_a_reason() -> None:
    refused = [row for row in ROWS.values() if row["outcome"] == "refused"]
    assert all(len(row["reason"]) > 20 and "\n" not in row["reason"] for row in refused)
    causal = [row for row in refused if row["family"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    assert len(causal) <= 10


def test_vllm_serves_packed_what_it_serves_dense() -> None:
    tried = {family: served for family in PRUNED if (served := ROWS[family]["served"])}
    assert set(WANTED) <= set(tried)
    for family, served in tried.items():
        if not served["dense"]:
            assert served["packed"] == "", family
            assert served["difference"] <= TOLERANCE, family


def test_a_family_of_which_no_tiny_model_can_be_built_is_told_apart(tmp_path: Path) -> None:
    found = try_family("blt", tmp_path)
    assert isinstance(found, Outcome)
    assert found.outcome == "not tried"
    assert "million parameters" in found.reason
