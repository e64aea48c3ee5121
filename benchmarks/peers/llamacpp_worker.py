"""One model in llama.cpp; runs in that tool's environment and imports nothing of ours.

``benchmarks/peers/llamacpp.py`` starts it. It answers one request after another, a JSON object a
line each way, as ``sparseserve.serving.measure.worker`` does for vLLM::

    {"prompts": [[1, 2], [3, 4]], "new_tokens": 8}     # a batch, continued greedily
    {"windows": [[1, 2, 3]]}                           # negative log-likelihoods, in nats

With ``--quantize TYPE --to FILE`` it rewrites the model instead, and ends.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as llama  # type: ignore[import-not-found]  # only its own environment has it
import numpy as np
from numpy.typing import NDArray

FILE_TYPES = {
    "F16": llama.LLAMA_FTYPE_MOSTLY_F16,
    "BF16": llama.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def quantize(source: Path, kind: str, out: Path) -> None:
    """Write ``source`` again with matrices of the ``kind``.

    Raises:
        SystemExit: llama.cpp cannot.
    """
    knobs = llama.llama_model_quantize_default_params()
    knobs.ftype, knobs.allow_requantize = FILE_TYPES[kind], True
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), knobs):
        raise SystemExit(f"llama.cpp cannot make {kind} of {source}")


class Model:
    """A model and its cache of keys and values."""

    def __init__(self, file: Path, sequences: int, length: int, threads: int) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            str(file).encode(), llama.llama_model_default_params()
        )
        knobs = llama.llama_context_default_params()
        knobs.n_ctx, knobs.n_seq_max = sequences * length, sequences
        knobs.n_batch = knobs.n_ctx
        knobs.n_threads = knobs.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, knobs)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp cannot open {file}")
        self._tokens = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(knobs.n_batch, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """Continue ``prompts`` greedily, all in one batch."""
        self._forget()
        marks = [time.perf_counter()]
        places = self._prompts(prompts)
        found = [[self._best(place)] for place in places]
        marks.append(time.perf_counter())
        for step in range(new_tokens - 1):
            entries = [
                (tokens[-1], len(prompt) + step, sequence, True)
                for sequence, (prompt, tokens) in enumerate(zip(prompts, found, strict=True))
            ]
            self._decode(entries)
            for place, tokens in enumerate(found):
                tokens.append(self._best(place))
            marks.append(time.perf_counter())
        return {
            "tokens": found,
            "first_token_seconds": marks[1] - marks[0],
            "step_seconds": np.diff(marks[1:]).tolist(),
            "total_seconds": marks[-1] - marks[0],
        }

    def negative_log_likelihood(self, window: Sequence[int]) -> float:
        """Return it, summed over all tokens but the first."""
        self._forget()
        self._decode([(token, place, 0, True) for place, token in enumerate(window)])
        logits = np.stack([self._logits(place) for place in range(len(window) - 1)])
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(shifted).sum(axis=1))
        chosen = shifted[np.arange(len(window) - 1), list(window[1:])]
        return float((normaliser - chosen).sum())

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Compute ``prompts`` and return where the last token of each lies in the batch."""
        entries: list[tuple[int, int, int, bool]] = []
        places = []
        for sequence, prompt in enumerate(prompts):
            entries += [
                (token, place, sequence, place == len(prompt) - 1)
                for place, token in enumerate(prompt)
            ]
            places.append(len(entries) - 1)
        self._decode(entries)
        return places

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute tokens, each given with its place, its sequence, and whether logits are due."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for number, (token, place, sequence, due) in enumerate(entries):
            batch.token[number], batch.pos[number] = token, place
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = due
        if code := llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama.cpp cannot decode {len(entries)} tokens: code {code}")

    def _logits(self, place: int) -> NDArray[np.float32]:
        found = llama.llama_get_logits_ith(self._context, place)
        return np.ctypeslib.as_array(found, shape=(self._tokens,))

    def _best(self, place: int) -> int:
        return int(self._logits(place).argmax())

    def _forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    match = re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def answer(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    if "prompts" in request:
        return model.generate(request["prompts"], request["new_tokens"])
    if "windows" in request:
        return {"totals": [model.negative_log_likelihood(row) for row in request["windows"]]}
    return {"resident_bytes": resident_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quantize", choices=sorted(FILE_TYPES))
    parser.add_argument("--to", type=Path)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="Longest sequence.")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.quantize:
        quantize(options.file, options.quantize, options.to)
        return
    model = Model(options.file, options.sequences, options.length, options.threads)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(model, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
