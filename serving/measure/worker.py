"""A process that holds one vLLM engine and answers the requests of ``serving.engine``."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import IO, TYPE_CHECKING

from sparseserve.errors import first_line
from sparseserve.serving.launch.policy import GPU_FRACTION_OF_TWO
from sparseserve.serving.measure.memory import EngineMemory
from sparseserve.serving.measure.states import with_room_for_states

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.logprobs import Logprob


def main(arguments: list[str]) -> int:
    """Start the engine the first request describes, then answer requests until there are none."""
    request_end, reply_end = (int(argument) for argument in arguments)
    for end in (request_end, reply_end):
        os.set_inheritable(end, False)
    with os.fdopen(request_end) as requests, os.fdopen(reply_end, "w") as replies:
        engine: LLM | None = None
        for line in requests:
            request = json.loads(line)
            answer: dict[str, object]
            try:
                if engine is None:
                    engine = start(request)
                    answer = engine_memory(engine)
                else:
                    answer = _operation(request)(engine, request)
            except Exception as error:  # handed to the parent, who raises it
                traceback.print_exc()
                _send(replies, {"error": _reason(error)})
                return 1
            _send(replies, answer)
    return 0


def start(options: dict[str, object]) -> LLM:
    """Start an engine that takes and gives token ids and shares nothing between requests."""
    from vllm import LLM

    return LLM(
        **with_room_for_states(
            {
                **options,
                "skip_tokenizer_init": True,
                "enable_prefix_caching": False,
                "gpu_memory_utilization": GPU_FRACTION_OF_TWO,
                "disable_log_stats": True,
            }
        )
    )


def engine_memory(engine: LLM) -> dict[str, object]:
    """Measure what an engine takes that has just been started."""
    cache_bytes = engine.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    (memory,) = engine.apply_model(partial(EngineMemory.of, cache_bytes=cache_bytes))
    return asdict(memory)


def negative_log_likelihoods(engine: LLM, request: dict[str, object]) -> dict[str, object]:
    """Sum the negative log-likelihood of every token of each window but its first.

    ``prompt_logprobs=0`` asks for the log-likelihood of the prompt's own tokens and no others.
    vLLM takes it from float32 logits; it cannot do without making one new token.
    """
    windows: list[list[int]] = request["windows"]  # type: ignore[assignment]  # JSON
    found = _prompt_likelihoods(engine, windows)
    return {"totals": [-sum(float(token.logprob) for token in tokens) for tokens in found]}


def continuations(engine: LLM, request: dict[str, object]) -> dict[str, object]:
    """Sum the log-likelihood of the last tokens of each sequence, and say if each is the likeliest.

    ``counts`` says how many tokens that are.
    """
    sequences: list[list[int]] = request["sequences"]  # type: ignore[assignment]  # JSON
    counts: list[int] = request["counts"]  # type: ignore[assignment]  # JSON
    ends = [
        tokens[len(tokens) - count :]
        for tokens, count in zip(_prompt_likelihoods(engine, sequences), counts, strict=True)
    ]
    return {
        "totals": [sum(float(token.logprob) for token in tokens) for tokens in ends],
        "greedy": [all(token.rank == 1 for token in tokens) for tokens in ends],
    }


def _prompt_likelihoods(engine: LLM, prompts: list[list[int]]) -> Iterator[list[Logprob]]:
    """Yield what vLLM says of each prompt's own tokens, but for the first, which has nothing."""
    from vllm import SamplingParams

    parameters = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        yield [entry[token] for token, entry in pairs]


def generate(engine: LLM, request: dict[str, object]) -> dict[str, object]:
    """Generate one batch greedily, timing every step from the batch's first tokens on.

    Raises:
        RuntimeError: A prompt was continued to its end before another had its first token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    prompts: list[list[int]] = request["prompts"]  # type: ignore[assignment]  # JSON
    parameters = SamplingParams(
        max_tokens=request["new_tokens"],
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters.clone())
    tokens: dict[int, list[int]] = {}
    # When every prompt had its first token, and when each step after that one ended.
    ends: list[float] = []
    while engine.llm_engine.has_unfinished_requests():
        outputs = engine.llm_engine.step()
        for output in outputs:
            if output.outputs[0].token_ids:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
            if output.finished and len(tokens) < len(prompts):
                raise RuntimeError(
                    f"{len(prompts)} prompts did not run at once: give smaller --batch-sizes"
                )
        # A step may only start work, and give nothing yet.
        if outputs and len(tokens) == len(prompts):
            ends.append(time.perf_counter() - started)
    return {
        "tokens": [tokens[number] for number in range(len(prompts))],
        "first_token_seconds": ends[0],
        "step_seconds": [end - start for start, end in pairwise(ends)],
        "total_seconds": time.perf_counter() - started,
    }


def layer_choices(engine: LLM, request: dict[str, object]) -> dict[str, object]:
    """Describe how each 2:4 layer is run."""
    from sparseserve.serving.kernels import BATCHES
    from sparseserve.serving.plugin.chosen import chosen_kernels

    (chosen,) = engine.apply_model(chosen_kernels)
    return {
        "layers": [
            {
                "name": name,
                "layer": found.layer,
                "plan": found.chosen,
                "refusals": dict(found.refusals),
                "kernels": {batch: found.kernel(batch) for batch in BATCHES if found.times},
                "times": {times.kernel: times.seconds for times in found.times},
            }
            for name, found in chosen.items()
        ]
    }


_OPERATIONS: Mapping[str, Callable[[LLM, dict[str, object]], dict[str, object]]] = MappingProxyType(
    {
        "windows": negative_log_likelihoods,
        "sequences": continuations,
        "prompts": generate,
        "layers": layer_choices,
    }
)


def _operation(
    request: dict[str, object],
) -> Callable[[LLM, dict[str, object]], dict[str, object]]:
    return next(run for key, run in _OPERATIONS.items() if key in request)


def _reason(error: Exception) -> str:
    """Return the first line of the error that started it all."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _send(replies: IO[str], answer: dict[str, object]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
