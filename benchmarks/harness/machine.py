"""What a committed result says about where it was measured."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

import torch

from sparseserve.machine import installed_versions, this_machine


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
        machine, versions = this_machine(), installed_versions()
        return cls(
            cpu=f"{machine.cpu}, {machine.cores} cores",
            threads=torch.get_num_threads(),
            gpu=machine.gpu,
            torch=versions["torch"],
            transformers=versions["transformers"],
            commit=_commit(),
            date=time.strftime("%Y-%m-%d", time.gmtime()),
        )


def _commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"
