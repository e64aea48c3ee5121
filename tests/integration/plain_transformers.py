"""Open checkpoints as a program does that never heard of sparseserve; run by the tests as a script.

Each argument is a folder that holds ``packed`` and ``dense``. Printed is a JSON object: for each
folder, the names of tensors that differ when packed, and when saved and opened again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def state(folder: Path | str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return dict(model.state_dict())


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    names = one.keys() | other.keys()
    return [name for name in names if not same(one.get(name), other.get(name))]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype:
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def compare(folder: Path) -> dict[str, list[str]]:
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype="auto")
    found = {"packed": differing(dict(packed.state_dict()), state(folder / "dense"))}
    with tempfile.TemporaryDirectory() as saved:
        packed.save_pretrained(saved)
        found["saved"] = differing(dict(packed.state_dict()), state(saved))
    return found


if __name__ == "__main__":
    print(json.dumps({folder: compare(Path(folder)) for folder in sys.argv[1:]}))
