"""vLLM's own OpenAI server on a sparseserve checkpoint, with defaults for the machine.

Nothing stands between the user and vLLM: this process checks what can be checked early, works out
the options the user did not give, and becomes ``vllm serve``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sparseserve.errors import ServingError
from sparseserve.machine import Machine, installed_versions, this_machine
from sparseserve.serving.launch.requirements import require_vllm
from sparseserve.serving.launch.served_model import ServedModel

GIB = 2**30
# What vLLM, torch and the libraries under them take on a CPU before any weight is loaded.
_PROCESS_BYTES = 2 * GIB
# While weights are loaded, a layer exists as read and as laid out for the product, and some
# models' embeddings stay twice.
_LOADING_FACTOR = 1.25
_LARGEST_CACHE = 4 * GIB
_CACHE_SHARE = 0.5
_BLOCK_TOKENS = 128
# A request of the longest kind must leave room for others.
_CONCURRENT_LONGEST = 2
_FULL_HOUSE = 64


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command line and what it adds to the environment."""

    arguments: tuple[str, ...]
    environment: dict[str, str]


def server_command(folder: Path, options: Sequence[str]) -> ServerCommand:
    """Return the command that serves ``folder``.

    Args:
        folder: Any checkpoint vLLM can read; a ``packed24`` one names its method itself.
        options: The user's own, for ``vllm serve``; they come last and win.

    Raises:
        MissingExtraError: vLLM is not installed.
        ServingError: The folder or the installation cannot be served; says what to do.
    """
    require_vllm("serving")
    model = ServedModel.open(folder)
    defaults = default_options(model, this_machine(), options, os.environ)
    return ServerCommand(
        arguments=(
            sys.executable,
            "-m",
            *_server_program(),
            str(folder),
            *defaults,
            *options,
        ),
        environment={"VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1")},
    )


def become(command: ServerCommand) -> NoReturn:
    """Replace this process with ``command``."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def default_options(
    model: ServedModel, machine: Machine, options: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Return the options to put before the user's.

    On a GPU, or with a configuration file (``--config``), there are none: vLLM's own are good. On a
    CPU, vLLM would compile for minutes, compute in an emulated dtype and claim almost all memory.

    Raises:
        ServingError: The weights alone need more memory than is free.
    """
    if machine.gpu or _given(options, "--config"):
        return []
    defaults: list[str] = []
    if not _given(options, "--dtype") and not machine.native_bfloat16:
        defaults += ["--dtype", "float32"]
    compilation = ("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc", "-O")
    if not any(_given(options, flag) for flag in compilation):
        defaults += ["--enforce-eager"]
    cache_is_given = _given(options, "--kv-cache-memory-bytes") or environment.get(
        "VLLM_CPU_KVCACHE_SPACE"
    )
    if not cache_is_given:
        defaults += _cache_options(model, machine, options, _bytes_per_number(options, defaults))
    return defaults


def _server_program() -> tuple[str, ...]:
    """Return the module that is ``vllm serve``, up to the model."""
    if "vllm" in installed_versions():
        return ("vllm.entrypoints.cli.main", "serve")
    # The command of vllm-cpu 0.32 fails before it starts: it asks for the version of a package
    # called vllm. The server it would start does not.
    return ("vllm.entrypoints.launchers.api_server.entry", "--model")


def _cache_options(
    model: ServedModel, machine: Machine, options: Sequence[str], width: int
) -> list[str]:
    """Size the cache of keys and values, and the longest sequence, to the memory that is free.

    Raises:
        ServingError: The weights alone need more memory than is free.
    """
    weights = int(model.dense_parameters * width * _LOADING_FACTOR)
    rest = machine.free_bytes - weights - _PROCESS_BYTES
    block = model.cache_numbers_per_token * width * _BLOCK_TOKENS
    # Of a small model, more than a full house of its longest sequences would lie idle.
    useful = _LARGEST_CACHE
    if model.max_positions is not None:
        useful = block * -(-model.max_positions // _BLOCK_TOKENS) * _FULL_HOUSE
    cache = int(min(_LARGEST_CACHE, useful, rest * _CACHE_SHARE)) // block * block
    if cache < _CONCURRENT_LONGEST * block:
        raise ServingError(
            f"{model.folder}: needs {(weights + _PROCESS_BYTES) / GIB:.1f} GiB and a cache in "
            f"memory, {machine.free_bytes / GIB:.1f} GiB are free: free some, or give --dtype "
            "bfloat16 or --kv-cache-memory-bytes after --"
        )
    sized = ["--kv-cache-memory-bytes", str(cache)]
    longest = cache // block // _CONCURRENT_LONGEST * _BLOCK_TOKENS
    too_long = model.max_positions is not None and model.max_positions > longest
    if too_long and not _given(options, "--max-model-len"):
        sized += ["--max-model-len", str(longest)]
    return sized


def _bytes_per_number(options: Sequence[str], defaults: Sequence[str]) -> int:
    everything = [*defaults, *options]
    return 4 if "float32" in everything or "--dtype=float32" in everything else 2


def _given(options: Sequence[str], flag: str) -> bool:
    """Whether the user gave ``flag``, in any of the spellings vLLM takes.

    Long ones may have underscores; short ones run on, as in ``-O3`` and ``-cc.mode=0``.
    """
    names = [option.partition("=")[0] for option in options if option.startswith("-")]
    if not flag.startswith("--"):
        return any(name.startswith(flag) for name in names)
    return flag in {name.replace("_", "-") for name in names}
