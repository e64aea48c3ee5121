"""The options that say who prunes the decoder layers, and the engine that they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from sparseserve.cli.options import Command, collected

if TYPE_CHECKING:
    from sparseserve.layerwise.pipeline import Engine

_OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who prunes the layers: this process, or the nodes of a Ray cluster at once. The "
        "result is the same. Ray needs a recipe without inter, such as parallel.",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        help="Head of the Ray cluster, or auto for the one this machine is part of. Default: "
        "RAY_ADDRESS, or else this machine alone.",
    ),
    click.option(
        "--gpus-per-layer",
        type=float,
        help="GPUs that Ray gives each layer, 0.5 for two layers a GPU. Default: 1 with --device "
        "cuda.",
    ),
    click.option(
        "--shared-disk",
        is_flag=True,
        help="All nodes see the output folder under one path: they read hidden states there.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What was given on the command line."""

    engine: str
    address: str | None
    gpus_per_layer: float | None
    shared_disk: bool

    def chosen(self) -> Engine:
        """Return the engine that was named.

        Raises:
            UsageError: An option of Ray was given without it.
        """
        if self.engine == "local":
            given = {
                "--address": self.address is not None,
                "--gpus-per-layer": self.gpus_per_layer is not None,
                "--shared-disk": self.shared_disk,
            }
            for name, is_given in given.items():
                if is_given:
                    raise click.UsageError(f"{name} goes with --engine ray.")
            from sparseserve.layerwise.pipeline import LocalEngine

            return LocalEngine()
        from sparseserve.distributed.ray_engine import RayEngine

        return RayEngine(
            address=self.address,
            gpus_per_layer=self.gpus_per_layer,
            shared_disk=self.shared_disk,
        )


def engine_options(command: Command) -> Command:
    """Add the options to ``command``, which receives them as one keyword ``engine``."""
    return collected(command, EngineOptions, "engine", _OPTIONS)
