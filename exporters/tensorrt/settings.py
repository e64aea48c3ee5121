"""What a TensorRT engine is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparseserve.errors import RecipeError

VIAS = ("onnx", "torch-tensorrt")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorRTSettings:
    """Sizes that the engine must take, and what is asked of it.

    Attributes:
        via: What TensorRT is given: the ONNX graph, or the model by torch-tensorrt.
        max_batch: Sequences at once.
        max_new: Tokens of a prompt.
        max_past: Tokens before them whose keys and values are kept.
        require_sparse: Whether an engine without any sparse tactic is an error.
    """

    via: Literal["onnx", "torch-tensorrt"] = "onnx"
    max_batch: int = 4
    max_new: int = 512
    max_past: int = 2048
    require_sparse: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_new", "max_past"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise RecipeError(f"{option} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True, slots=True)
class InputRange:
    """The shapes that one input of the engine takes, and the one it is tuned for."""

    name: str
    smallest: Shape
    best: Shape
    largest: Shape


def input_ranges(
    inputs: dict[str, tuple[int | None, ...]], settings: TensorRTSettings
) -> list[InputRange]:
    """Return the range of each input of our ONNX graph.

    Args:
        inputs: Shapes by name; None where a size is free.
        settings: The largest sizes.
    """
    batch, new, past = settings.max_batch, settings.max_new, settings.max_past
    found: list[InputRange] = []
    for name, shape in inputs.items():
        if name.startswith("past_key_values."):
            heads, width = int(shape[1] or 0), int(shape[3] or 0)
            sizes: list[Shape] = [
                (1, heads, 0, width),
                (1, heads, past, width),
                (batch, heads, past, width),
            ]
        elif name == "attention_mask":
            sizes = [(1, 1), (1, 1 + past), (batch, new + past)]
        else:
            # One new token is what an engine computes most often.
            sizes = [(1, 1), (1, 1), (batch, new)]
        found.append(InputRange(name, *sizes))
    return found
