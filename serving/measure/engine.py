"""vLLM engines in processes of their own, so that two can be measured in turns.

A worker (``sparseserve.serving.measure.worker``) holds one engine and answers one request after
another, a JSON object a line each way, over two pipes that nothing else writes to. What vLLM prints
goes to a log, of which the end is shown if the worker dies.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.machine import this_machine
from sparseserve.serving.kernels.choice.choose import MEASURE_VARIABLE
from sparseserve.serving.launch.child import Child, python_module
from sparseserve.serving.launch.policy import cache_bytes_for, runs_eagerly, vllm_dtype
from sparseserve.serving.launch.requirements import require_vllm
from sparseserve.serving.measure.layer_choice import LayerChoice
from sparseserve.serving.measure.memory import EngineMemory

if TYPE_CHECKING:
    from sparseserve.serving.launch.served_model import ServedModel

_WORKER = "sparseserve.serving.measure.worker"
_STOP_SECONDS = 10


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to start one engine.

    Attributes:
        model: Folder of the checkpoint.
        dtype: As vLLM takes it.
        quantization: As vLLM takes it; None leaves it to the checkpoint.
        max_model_len: Longest sequence, in tokens.
        max_num_seqs: Sequences at once.
        max_num_batched_tokens: Prompt tokens computed in one step.
        kv_cache_memory_bytes: Size of the cache of keys and values.
        enforce_eager: Whether to run without compilation and CUDA graphs.
        distributed_executor_backend: As vLLM takes it; None runs the model in the engine's process.
    """

    model: str
    dtype: str
    quantization: str | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int
    enforce_eager: bool
    distributed_executor_backend: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A batch that was generated, and how long it took.

    Attributes:
        tokens: New tokens of each prompt.
        first_token_seconds: Until every prompt of the batch had its first new token.
        step_seconds: Of each step after that one; a step gives every prompt one token.
        total_seconds: Until every prompt had its last.
    """

    tokens: tuple[tuple[int, ...], ...]
    first_token_seconds: float
    step_seconds: tuple[float, ...]
    total_seconds: float


def engine_options(
    model: ServedModel,
    *,
    max_model_len: int,
    max_num_seqs: int = 1,
    batch_model_len: int | None = None,
    prompt_tokens: int = 1024,
    dtype: torch.dtype | None = None,
    quantization: str | None = None,
    threads_of_server: bool = False,
    compiled: bool = False,
) -> EngineOptions:
    """Return options that hold what is asked for and no more, so that two engines fit.

    On a GPU the engine runs as a server does, with CUDA graphs; on a CPU without compilation, as
    ``sparseserve serve`` does there, unless it is to be ``compiled``.

    Args:
        model: The checkpoint.
        max_model_len: Longest sequence, prompt and new tokens together.
        max_num_seqs: Largest batch.
        batch_model_len: Longest sequence of a batch; None is ``max_model_len``.
        prompt_tokens: Prompt tokens to compute in one step.
        dtype: To compute in; None is the checkpoint's own where the machine has it, else float32.
        quantization: As vLLM takes it; None leaves it to the checkpoint.
        threads_of_server: Whether to run the model in a process of its own: there vLLM binds its
            threads to cores, and leaves one core free, as in its server.
        compiled: Whether vLLM compiles the model on a CPU, too.
    """
    machine = this_machine()
    return EngineOptions(
        model=str(model.folder),
        dtype=vllm_dtype(machine, model, dtype),
        quantization=quantization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(prompt_tokens, max_num_seqs),
        kv_cache_memory_bytes=cache_bytes_for(
            model, max_num_seqs, batch_model_len or max_model_len, longest=max_model_len
        ),
        enforce_eager=runs_eagerly(machine) and not compiled,
        distributed_executor_backend="mp" if threads_of_server and machine.gpu is None else None,
    )


class Engine:
    """A running worker, to be used in a ``with`` block.

    Attributes:
        options: How it was started.
        memory: What it took, once it was up.
    """

    def __init__(self, options: EngineOptions, *, measure_kernels: bool = False) -> None:
        """Start the worker and wait until its engine is up.

        Args:
            options: How.
            measure_kernels: Whether to time kernels anew, whatever is on disk.

        Raises:
            ServingError: The engine cannot be started; carries the engine's own reason.
            MissingExtraError: vLLM is not installed.
        """
        require_vllm("measuring through vLLM")
        self.options = options
        self._worker, self._requests, self._replies = _start_worker(
            _worker_environment(measure_kernels=measure_kernels)
        )
        try:
            self.memory = EngineMemory.from_json(self._ask(asdict(options)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the worker: the end of its requests is its sign to leave."""
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._worker.wait(_STOP_SECONDS)
        self._worker.stop()

    def negative_log_likelihoods(self, windows: Sequence[Tensor]) -> list[float]:
        """Return the negative log-likelihood of each of ``windows``, in nats.

        It is summed over all tokens of a window but the first.

        Raises:
            ServingError: The engine failed.
        """
        reply = self._ask({"windows": [window.tolist() for window in windows]})
        return [float(total) for total in _list(reply["totals"])]

    def continuation_likelihoods(
        self, sequences: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """Return how likely the end of each of ``sequences`` is after what stands before it.

        Args:
            sequences: Token ids.
            counts: How many tokens the end of each has, less than the sequence.

        Returns:
            The log-likelihood of each end, in nats, and whether greedy choice would write it.

        Raises:
            ServingError: The engine failed.
        """
        reply = self._ask(
            {"sequences": [list(tokens) for tokens in sequences], "counts": list(counts)}
        )
        totals, greedy = _list(reply["totals"]), _list(reply["greedy"])
        return [(float(total), bool(each)) for total, each in zip(totals, greedy, strict=True)]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue all ``prompts`` as one batch, greedily, by exactly ``new_tokens`` tokens each.

        Raises:
            ServingError: The engine failed.
        """
        reply = self._ask(
            {"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens}
        )
        return Generation(
            tokens=tuple(tuple(map(int, _list(tokens))) for tokens in _list(reply["tokens"])),
            first_token_seconds=float(str(reply["first_token_seconds"])),
            step_seconds=tuple(map(float, _list(reply["step_seconds"]))),
            total_seconds=float(str(reply["total_seconds"])),
        )

    def layer_choices(self) -> list[LayerChoice]:
        """Return how each 2:4 layer is run, as it was chosen while the model was loaded.

        Raises:
            ServingError: The engine failed.
        """
        reply = self._ask({"layers": "all"})
        return [LayerChoice.from_json(layer) for layer in _list(reply["layers"])]

    def _ask(self, request: dict[str, object]) -> dict[str, object]:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ServingError(
                f"{self.options.model}: the vLLM worker died with exit code "
                f"{self._worker.wait()}; its last words: {self._worker.last_words()}"
            )
        reply: dict[str, object] = json.loads(line)
        if "error" in reply:
            raise ServingError(f"{self.options.model}: vLLM failed: {reply['error']}")
        return reply


def _start_worker(environment: dict[str, str]) -> tuple[Child, IO[str], IO[str]]:
    with _pipe() as (request_end, requests), _pipe() as (replies, reply_end):
        worker = Child(
            (*python_module(_WORKER), str(request_end), str(reply_end)),
            environment=environment,
            descriptors=(request_end, reply_end),
        )
        os.close(request_end)
        os.close(reply_end)
        return worker, os.fdopen(requests, "w"), os.fdopen(replies)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    except BaseException:
        for end in ends:
            os.close(end)
        raise


def _worker_environment(*, measure_kernels: bool) -> dict[str, str]:
    return {
        **({MEASURE_VARIABLE: "1"} if measure_kernels else {}),
        # The engine in the worker itself: one process to time, and its errors arrive whole.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A window as long as the model takes leaves no place for the token that vLLM always makes.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"the worker sent {type(value).__name__} where a list was due")
    return value
