"""Tables of what was measured on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.markdown import head, line
from benchmarks.harness.results import Result
from benchmarks.quality.tables import (
    DENSE,
    by_variant,
    calibration_text,
    label,
    measured,
    perplexities,
    tokens,
)

_OUTCOMES = ("passed", "failure", "error", "skipped")


def outcomes_table(result: Result) -> str:
    """Outcomes of the GPU tests by what they test, and why some were skipped."""
    lines = [head("test", "passed", "failed", "skipped")]
    for name, counts in result["outcomes"].items():
        passed, failed, errors, skipped = (counts.get(kind, 0) for kind in _OUTCOMES)
        words = name.removeprefix("test_").replace("_", " ")
        lines.append(line(words, str(passed), str(failed + errors), str(skipped)))
    lines.append(f"\n{_on(result['machine'])}. Skipped:\n")
    lines += [f"- {count}: {reason}" for reason, count in result["skipped"].items()]
    return "\n".join(lines)


def pruning_table(result: Result) -> str:
    """Time and perplexity of pruning on a GPU."""
    setting, machine = result["setting"], result["machine"]
    lines = [head("", "seconds", *(f"perplexity, {text}" for text in setting["texts"]))]
    for variant, runs in by_variant(result["runs"]).items():
        name, seconds = "the dense model", ""
        if variant != DENSE:
            name, seconds = label(variant), f"{runs[0]['seconds']:.0f}"
        lines.append(line(name, seconds, perplexities(runs, setting["texts"])))
    lines.append(
        f"\n`{Path(setting['model']).name}`, {setting['pattern']}, {tokens(setting):,} calibration "
        f"tokens of {calibration_text(setting['calibration'])}, one seed, {machine['gpu']}; "
        f"{measured([result])}"
    )
    return "\n".join(lines)


def _on(machine: dict[str, Any]) -> str:
    return (
        f"{machine['gpu']} (compute capability {machine['capability']}), torch {machine['torch']} "
        f"with CUDA {machine['cuda']} and cuSPARSELt {machine['cusparselt']}, Triton "
        f"{machine['triton']}, commit {machine['commit']}, {machine['date']}"
    )


GPU_TABLES: dict[str, Callable[[Result], str]] = {
    "gpu-tests-h200": outcomes_table,
    "gpu-quality-smollm2-h200": pruning_table,
}
