"""Start one engine after another in this process; read jobs from, and write results to, files.

Run by the tests as a script: importing vLLM once for all the models saves most of the time. Each
job and each result is an object in a JSON list.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.serving.measure.engine import engine_options
from sparseserve.serving.measure.worker import generate, start
from sparseserve.serving.plugin.chosen import chosen_kernels


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    options = engine_options(
        ServedModel.open(Path(job["folder"])),
        max_model_len=128,
        max_num_seqs=4,
        dtype=torch.float32,
        quantization=job["quantization"],
    )
    try:
        engine = start({**asdict(options), **job["options"]})
        windows = job["windows"]
        found = log_probabilities(engine, windows) if job["log_probabilities"] else None
        tokens = generate(engine, {"prompts": windows, "new_tokens": job["new_tokens"]})["tokens"]
        layers = list(engine.apply_model(chosen_kernels)[0])  # every process has the same
        del engine
        return {"log_probabilities": found, "tokens": tokens, "layers": layers}
    except Exception as error:  # the test asserts on it
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def log_probabilities(engine: Any, windows: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of every token of each window but its first."""
    from vllm import SamplingParams

    parameters = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
    prompts = [{"prompt_token_ids": window} for window in windows]
    return [
        [
            entry[token].logprob
            for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)
        ]
        for window, output in zip(
            windows, engine.generate(prompts, parameters, use_tqdm=False), strict=True
        )
    ]


if __name__ == "__main__":
    jobs_file, results_file = (Path(argument) for argument in sys.argv[1:])
    jobs = json.loads(jobs_file.read_text())
    results_file.write_text(json.dumps([run(job) for job in jobs]))
