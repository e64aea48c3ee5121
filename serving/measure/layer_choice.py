"""How an engine in another process runs its 2:4 layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How an engine runs one of its 2:4 layers.

    Attributes:
        name: vLLM's name of the layer.
        layer: Its rows, columns and dtypes.
        plan: Which kernel runs which batch, in words.
        refusals: Why other kernels cannot run it, by name.
        kernels: The kernel of each timed batch size; empty where there was no choice.
        times: Seconds by kernel and batch size.
    """

    name: str
    layer: str
    plan: str
    refusals: dict[str, str]
    kernels: dict[int, str]
    times: dict[str, dict[int, float]]

    @classmethod
    def from_json(cls, reply: dict[str, Any]) -> LayerChoice:
        """Read what the worker sent; JSON makes strings of batch sizes."""
        return cls(
            name=reply["name"],
            layer=reply["layer"],
            plan=reply["plan"],
            refusals=reply["refusals"],
            kernels={int(batch): kernel for batch, kernel in reply["kernels"].items()},
            times={
                kernel: {int(batch): seconds for batch, seconds in times.items()}
                for kernel, times in reply["times"].items()
            },
        )
