"""Serves the dense and the packed forms of tiny models with vLLM, in this process.

``benchmarks.families.served`` starts it. ::

    python -m benchmarks.families.serve_forms FOLDERS.json RESULTS.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from sparseserve.errors import first_line
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import engine_options
from sparseserve.serving.measure.worker import start

WINDOWS = [list(range(10, 74)), list(range(20, 80))]


def compare_forms(folder: Path) -> dict[str, Any]:
    """Serve the two forms in ``folder`` in this process."""
    values: dict[str, list[float]] = {}
    for form in ("dense", "packed"):
        try:
            values[form] = log_probabilities(folder / form)
        except Exception as error:  # whatever vLLM raises is the answer
            return {form: f"{type(error).__name__}: {first_line(error)}"}
    difference = torch.tensor(values["dense"]) - torch.tensor(values["packed"])
    return {"difference": float(difference.abs().max())}


def log_probabilities(folder: Path) -> list[float]:
    """Return the log-probability of every token of each window but its first, under vLLM."""
    options = engine_options(
        ServedModel.open(folder),
        max_model_len=128,
        max_num_seqs=4,
        dtype=torch.float32,
        quantization=None,
    )
    try:
        engine = start(asdict(options))
        asked = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0, detokenize=False)
        prompts = [{"prompt_token_ids": window} for window in WINDOWS]
        outputs = engine.generate(prompts, asked, use_tqdm=False)
        del engine
        return [
            entry[token].logprob
            for window, output in zip(WINDOWS, outputs, strict=True)
            for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)
        ]
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    if missing_library() is None:
        # Our own kernels, whatever is fastest for matrices as small as these.
        os.environ["SPARSESERVE_KERNELS"] = "cpu_unpacked,cpu_dense"
    asked_for, answers = map(Path, sys.argv[1:])
    found = [compare_forms(Path(folder)) for folder in json.loads(asked_for.read_text())]
    answers.write_text(json.dumps(found))
