"""Engines of a real vLLM, one after another in a process, compared with transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SCRIPT = Path(__file__).parent / "many_engines.py"
WINDOWS = [list(range(10, 74)), list(range(20, 120))]
NEW_TOKENS = 8
# Of a log-probability in float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A folder to be served.

    Attributes:
        dense: The copy that transformers can read.
        folder: What vLLM reads.
        quantization: As vLLM takes it.
        options: Of vLLM, beside those that every case has.
        log_probabilities: Whether to ask for those of the prompt, too.
    """

    dense: Path
    folder: Path
    quantization: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    log_probabilities: bool = True


@dataclass(frozen=True)
class Served:
    """What became of one folder; ``dense`` is the copy transformers can read."""

    dense: Path
    result: dict[str, Any]


def serve_all(cases: Mapping[str, Case], place: Path, **environment: str) -> dict[str, Served]:
    """Start one engine for each case, all in one process, and write what passes in ``place``."""
    jobs = [
        {
            "folder": str(case.folder),
            "quantization": case.quantization,
            "windows": WINDOWS,
            "new_tokens": NEW_TOKENS,
            "log_probabilities": case.log_probabilities,
            "options": dict(case.options),
        }
        for case in cases.values()
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), str(place / "jobs.json"), str(place / "results.json")],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    results: list[dict[str, Any]] = json.loads((place / "results.json").read_text())
    return {
        name: Served(case.dense, result)
        for (name, case), result in zip(cases.items(), results, strict=True)
    }


def require_what_transformers_computes(
    case: Served,
    tolerance: float = TOLERANCE,
    change: Callable[[PreTrainedModel], None] = lambda model: None,
) -> None:
    result, dense = case.result, case.dense
    assert "error" not in result, result
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    change(model)
    if result["log_probabilities"] is not None:
        expected = transformers_log_probabilities(model)
        found = torch.tensor([*chain(*result["log_probabilities"])], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert result["tokens"] == transformers_tokens(model)


def transformers_log_probabilities(model: PreTrainedModel) -> torch.Tensor:
    """Return the log-probability of every token of each window but its first, one after another."""
    found = []
    with torch.no_grad():
        for window in WINDOWS:
            ids = torch.tensor([window])
            all_tokens = model(ids).logits[0, :-1].double().log_softmax(dim=-1)
            found.append(all_tokens.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def transformers_tokens(model: PreTrainedModel) -> list[list[int]]:
    found = []
    for window in WINDOWS:
        ids = torch.tensor([window])
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                best = model(ids).logits[0, -1].argmax()
            ids = torch.cat((ids, best.reshape(1, 1)), dim=1)
        found.append(ids[0, len(window) :].tolist())
    return found
