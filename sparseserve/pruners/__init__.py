"""The pruners, each a frozen dataclass of its knobs; add one here and the contract tests run it."""

from __future__ import annotations

from sparseserve.pruners.admm import Admm
from sparseserve.pruners.admm_gradual import GradualAdmm
from sparseserve.pruners.dsnot import Dsnot
from sparseserve.pruners.fista import Fista
from sparseserve.pruners.fista_paper import PaperFista
from sparseserve.pruners.magnitude import Magnitude
from sparseserve.pruners.protocol import PrunedWeight, Pruner
from sparseserve.pruners.refit import Refit
from sparseserve.pruners.ria import Ria
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda

PRUNERS: dict[
    str,
    type[
        Magnitude
        | Wanda
        | Ria
        | Dsnot
        | SparseGPT
        | GradualAdmm
        | Admm
        | Refit
        | Fista
        | PaperFista
    ],
] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": Ria,
    "dsnot": Dsnot,
    "sparsegpt": SparseGPT,
    "admm-gradual": GradualAdmm,
    "admm": Admm,
    "refit": Refit,
    "fista": Fista,
    "fista-paper": PaperFista,
}

__all__ = ["PRUNERS", "PrunedWeight", "Pruner"]
