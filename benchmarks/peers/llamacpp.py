"""llama.cpp as an engine: the model in one of its own forms, in a process of its environment."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.peers.environment import HERE, Peer, PeerError, environment, peer_settings
from sparseserve.serving.measure.engine import Generation

LLAMA_CPP = Peer("llamacpp", ())
_WORKER = HERE / "llamacpp_worker.py"


def quantized(gguf: Path, kind: str, out: Path) -> Path:
    """Write ``gguf`` again as the new file ``out`` with matrices of ``kind``, such as ``Q8_0``.

    Raises:
        PeerError: llama.cpp cannot be installed, or fails.
    """
    command = [str(environment(LLAMA_CPP)), "-P", str(_WORKER), str(gguf)]
    command += ["--quantize", kind, "--to", str(out)]
    done = subprocess.run(command, capture_output=True, env=peer_settings(), check=False)
    if done.returncode:
        raise PeerError(f"llama.cpp failed: {done.stderr.decode(errors='replace')[-400:]}")
    return out


@contextlib.contextmanager
def running(file: Path, *, sequences: int, length: int, threads: int) -> Iterator[LlamaCpp]:
    """Run llama.cpp while the block does.

    Args:
        file: The model.
        sequences: Largest batch.
        length: Longest sequence, prompt and new tokens together.
        threads: To compute with.
    """
    command = [str(environment(LLAMA_CPP)), "-P", str(_WORKER), str(file)]
    command += ["--sequences", str(sequences), "--length", str(length), "--threads", str(threads)]
    # The end of its requests is the worker's sign to leave.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=peer_settings(),
    ) as worker:
        yield LlamaCpp(worker)


class LlamaCpp:
    """A running worker; it is asked as vLLM's ``Engine`` is."""

    def __init__(self, worker: subprocess.Popen[str]) -> None:
        """Take its process."""
        self._worker = worker

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue all ``prompts`` as one batch, greedily, by exactly ``new_tokens`` tokens each.

        Raises:
            PeerError: llama.cpp failed.
        """
        reply = self._ask(prompts=[list(prompt) for prompt in prompts], new_tokens=new_tokens)
        return Generation(
            tokens=tuple(map(tuple, reply["tokens"])),
            first_token_seconds=reply["first_token_seconds"],
            step_seconds=tuple(reply["step_seconds"]),
            total_seconds=reply["total_seconds"],
        )

    def negative_log_likelihoods(self, windows: Sequence[Tensor]) -> list[float]:
        """Return the negative log-likelihood of each of ``windows``, in nats.

        Raises:
            PeerError: llama.cpp failed.
        """
        found: list[float] = self._ask(windows=[window.tolist() for window in windows])["totals"]
        return found

    def resident_bytes(self) -> int:
        """Return the memory of the process, with those pages of the model's file that are used.

        Raises:
            PeerError: llama.cpp failed.
        """
        return int(self._ask()["resident_bytes"])

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._worker.stdin.write(json.dumps(request) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        if not line:
            raise PeerError(f"llama.cpp ended with code {self._worker.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply
