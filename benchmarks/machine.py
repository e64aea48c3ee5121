"""What a committed result says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor, threads, software and commit of a measurement."""

    cpu: str
    threads: int
    gpu: str | None
    torch: str
    transformers: str
    commit: str
    date: str

    @classmethod
    def here(cls) -> Machine:
        return cls(
            cpu=_cpu_name(),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            torch=metadata.version("torch"),
            transformers=metadata.version("transformers"),
            commit=_commit(),
            date=time.strftime("%Y-%m-%d", time.gmtime()),
        )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"
