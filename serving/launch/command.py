"""vLLM's own OpenAI server on a sparseserve checkpoint, with defaults for the machine.

Nothing stands between the user and vLLM: this process checks what can be checked early, works out
the options the user did not give, and becomes ``vllm serve``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

import torch

from sparseserve.machine import Machine, installed_versions, this_machine
from sparseserve.serving.kernels.choice.choose import KERNELS_VARIABLE, packed_kernels
from sparseserve.serving.launch import watcher
from sparseserve.serving.launch.child import SAFE_PATH, python_module
from sparseserve.serving.launch.policy import (
    Ranks,
    ServerCache,
    runs_eagerly,
    server_cache,
    vllm_dtype,
)
from sparseserve.serving.launch.requirements import require_vllm
from sparseserve.serving.launch.served_model import ServedModel

#: vLLM itself would answer all machines that reach this one.
LOCAL_HOST = "127.0.0.1"
# What engines have to leave after their server has.
_ENGINE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A command line and what it adds to the environment; ``warning`` is a line for its user."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    warning: str = ""


def server_command(folder: Path, options: Sequence[str], *, verify: bool = False) -> ServerCommand:
    """Return the command that serves ``folder``.

    Args:
        folder: Any checkpoint vLLM can read; a ``packed24`` one names its method itself.
        options: The user's own, for ``vllm serve``; they come last and win.
        verify: Whether to verify the checkpoint, which must be ours, before it is served.

    Raises:
        MissingExtraError: vLLM is not installed.
        ServingError: The folder or the installation cannot be served; says what to do.
    """
    require_vllm("serving")
    model = ServedModel.open(folder, verified=verify)
    defaults = default_options(model, this_machine(), options, os.environ)
    return ServerCommand(
        arguments=(*_server_program(), str(folder), *address(options), *defaults.options, *options),
        environment={
            "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
            **defaults.environment,
            **SAFE_PATH,
        },
        warning=open_to_all(options, os.environ),
    )


def address(options: Sequence[str]) -> list[str]:
    """Return where to listen: on this machine alone, unless the user says where."""
    said = any(_given(options, flag) for flag in ("--host", "--uds", "--config"))
    return [] if said else ["--host", LOCAL_HOST]


def open_to_all(options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return a warning where other machines are answered without a key, or an empty text."""
    host = _value(options, "--host")
    is_local = host is None or host == "localhost" or _is_loopback(host)
    has_key = _given(options, "--api-key") or environment.get("VLLM_API_KEY")
    if is_local or has_key:
        return ""
    return (
        f"the server at {host} answers every machine that reaches this one, without a key: "
        "add --api-key KEY, or leave --host out"
    )


def become(command: ServerCommand) -> NoReturn:
    """Replace this process with ``command``, whose engines do not outlive it."""
    sys.stdout.flush()
    sys.stderr.flush()
    mark = watcher.new_mark()
    watcher.watch(mark, _ENGINE_SECONDS)
    environment = {**os.environ, **command.environment, watcher.MARK_VARIABLE: mark}
    os.execve(command.arguments[0], command.arguments, environment)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What vLLM is told that its user did not say."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def default_options(
    model: ServedModel, machine: Machine, options: Sequence[str], environment: Mapping[str, str]
) -> Defaults:
    """Return the options to put before the user's, and what goes with them.

    On a GPU, or with a configuration file (``--config``), there are none.

    Raises:
        ServingError: The weights alone need more memory than is free.
    """
    if machine.gpu or _given(options, "--config"):
        return Defaults()
    defaults: list[str] = []
    if not _given(options, "--dtype") and (dtype := vllm_dtype(machine, model)) != "auto":
        defaults += ["--dtype", dtype]
    compilation = (
        *("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc"),
        *("--optimization-level", "-O"),
    )
    if runs_eagerly(machine) and not any(_given(options, flag) for flag in compilation):
        defaults += ["--enforce-eager"]
    sizes = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")  # the latter on CPUs, too
    cache_is_given = any(_given(options, flag) for flag in sizes) or environment.get(
        "VLLM_CPU_KVCACHE_SPACE"
    )
    if cache_is_given:
        return Defaults(tuple(defaults))
    computed_in = _computes_in(model, options, defaults)
    kernels = packed_kernels(computed_in)
    cache = server_cache(
        model,
        machine,
        computed_in.itemsize,
        Ranks(
            _count(options, "--tensor-parallel-size", "-tp"),
            _count(options, "--data-parallel-size", "-dp"),
        ),
        can_stay_packed=bool(kernels),
    )
    stay_packed = cache.only_packed and KERNELS_VARIABLE not in environment
    return Defaults(
        (*defaults, *_cache_options(model, cache, options)),
        {KERNELS_VARIABLE: ",".join(kernels)} if stay_packed else {},
    )


def _server_program() -> tuple[str, ...]:
    """Return the command line that is ``vllm serve``, up to the model."""
    if "vllm" in installed_versions():
        return (*python_module("vllm.entrypoints.cli.main"), "serve")
    # The command of vllm-cpu 0.32 fails before it starts: it asks for the version of a package
    # called vllm. The server it would start does not.
    return (*python_module("vllm.entrypoints.launchers.api_server.entry"), "--model")


def _cache_options(model: ServedModel, cache: ServerCache, options: Sequence[str]) -> list[str]:
    sized = ["--kv-cache-memory-bytes", str(cache.size)]
    too_long = model.max_positions is not None and model.max_positions > cache.longest
    if too_long and not _given(options, "--max-model-len"):
        sized += ["--max-model-len", str(cache.longest)]
    return sized


def _computes_in(
    model: ServedModel, options: Sequence[str], defaults: Sequence[str]
) -> torch.dtype:
    """Return the dtype that vLLM will compute in on a CPU."""
    said = _value([*defaults, *options], "--dtype")
    if said in {"float32", "float"}:
        return torch.float32
    stored = said in {None, "auto"} and model.dtype == "float16"
    return torch.float16 if stored or said in {"float16", "half"} else torch.bfloat16


def _count(options: Sequence[str], *flags: str) -> int:
    """Return the number that the user gave for one of ``flags``; 1 if none, or none that is one."""
    given = (_value(options, flag) for flag in flags)
    return max(1, *(int(value) if value and value.isdecimal() else 1 for value in given))


def _value(options: Sequence[str], flag: str) -> str | None:
    """Return what the user gave for ``flag``, the last time; None if nothing."""
    found = None
    for place, option in enumerate(options):
        name, equals, value = option.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else next(iter(options[place + 1 :]), "")
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name, which may be that of any address


def _given(options: Sequence[str], flag: str) -> bool:
    """Whether the user gave ``flag``, in any of the spellings vLLM takes.

    Long ones may have underscores and name a part, as in ``--compilation-config.mode``; short ones
    run on, as in ``-O3`` and ``-cc.mode=0``.
    """
    names = [re.split("[=.]", option)[0] for option in options if option.startswith("-")]
    if not flag.startswith("--"):
        return any(name.startswith(flag) for name in names)
    return flag in {name.replace("_", "-") for name in names}
