"""The pruners, each a frozen dataclass of its knobs; add one here and the contract tests run it."""

from __future__ import annotations

from sparseserve.pruners.fista import Fista
from sparseserve.pruners.fista_paper import PaperFista
from sparseserve.pruners.magnitude import Magnitude
from sparseserve.pruners.protocol import PrunedWeight, Pruner
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda

PRUNERS: dict[str, type[Magnitude | Wanda | SparseGPT | Fista | PaperFista]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "fista": Fista,
    "fista-paper": PaperFista,
}

__all__ = ["PRUNERS", "PrunedWeight", "Pruner"]
