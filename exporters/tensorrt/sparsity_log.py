"""Which modules TensorRT could run on sparse tensor cores, and which it does.

TensorRT says so in two lines at the end of a build, at INFO level, and in the names of tactics that
the engine inspector gives. It times dense and sparse kernels and takes the faster, so the second
line is often empty. What is not said is unknown here, never no.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "no", "unknown"]

_ELIGIBLE = "(Sparsity) Layers eligible for sparse math:"
_PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers:"
# Lines begin with a time and a level, or with the level alone; others go on with the line before.
_NEW_LINE = re.compile(r"^\s*\[[^\]]+\]")
_SPARSE_TACTIC = re.compile(r"sparse|_sp_", re.IGNORECASE)
# A name that stands for many layers at once.
_MANY = re.compile(r"[{}]|ForeignNode|\.\.\.")


@dataclass(frozen=True, slots=True)
class Tactic:
    """A layer of the engine, and the kernel that it runs."""

    layer: str
    name: str


@dataclass(frozen=True, slots=True)
class ModuleSparsity:
    """What is known of one pruned module."""

    module: str
    eligible: Answer
    picked: Answer
    tactic: str | None


def module_sparsity(
    log: str, tactics: Sequence[Tactic], modules: Iterable[str]
) -> list[ModuleSparsity]:
    """Return what a build's log and its engine's tactics say of each module.

    Args:
        log: All of it.
        tactics: Of the engine's layers; none if the inspector said nothing.
        modules: Names of pruned modules, which are the names of their nodes in the graph.
    """
    eligible, picked = _names(log, _ELIGIBLE), _names(log, _PICKED)
    found = []
    for module in modules:
        tactic = next((item for item in tactics if module in _parts(item.layer)), None)
        name = tactic.name if tactic is not None else None
        # Names of fused kernels hide what they do, so a name can say yes, but not no.
        sparse = name is not None and _SPARSE_TACTIC.search(name)
        answer = "yes" if sparse else _answer(module, picked)
        found.append(ModuleSparsity(module, _answer(module, eligible), answer, name))
    return found


def _names(log: str, head: str) -> list[str] | None:
    """Return the layers that the line ``head`` lists; None if there is no such line."""
    lines = iter(log.splitlines())
    for line in lines:
        if head not in line:
            continue
        text = line.partition(head)[2]
        for following in lines:
            # A terminal cuts long lines anywhere.
            if _NEW_LINE.match(following) or not following.strip():
                break
            text += following
        return [name.strip() for name in text.split(",") if name.strip()]
    return None


def _answer(module: str, names: list[str] | None) -> Answer:
    if names is None:
        return "unknown"
    if any(module in _parts(name) for name in names):
        return "yes"
    return "unknown" if any(_MANY.search(name) for name in names) else "no"


def _parts(layer: str) -> set[str]:
    """Return the nodes that were made one ``layer``."""
    return {part.strip() for part in layer.split(" + ")}
