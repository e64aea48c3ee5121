"""The pruners that need no other: what searches start from, fall back on and refit."""

from __future__ import annotations

from sparseserve.pruners.magnitude import Magnitude
from sparseserve.pruners.protocol import Pruner
from sparseserve.pruners.ria import Ria
from sparseserve.pruners.sparsegpt import SparseGPT
from sparseserve.pruners.wanda import Wanda

ONE_SHOT: dict[str, Pruner] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": Ria(),
    "sparsegpt": SparseGPT(),
}
