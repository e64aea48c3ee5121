"""A Ray cluster: how it is reached, and how many layers it can take at once."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager

from sparseserve.errors import ClusterError, MissingExtraError, first_line
from sparseserve.paths import shown

# Ray itself tries for minutes, and ends the process then.
_SECONDS_TO_ANSWER = 5
# Ray gives a node 30 seconds to start; a busy machine has read Ray's files by the second time.
_STARTS = 3
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        MissingExtraError: It is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("ray", "distributed", "--engine ray")


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Be connected to a cluster while the block runs; what is begun here ends with it.

    Args:
        address: ``HOST:PORT`` of its head, or ``auto`` for one that this machine is part of. None
            is the one this process is connected to, or else that of RAY_ADDRESS, or else a
            cluster of this machine alone, started for the block.

    Raises:
        ClusterError: There is none, or it is of another release.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        # Workers look for modules in the folder that the driver is in at this moment.
        with chdir("/"):
            _connect(address)
    except Exception as error:  # Ray raises it bare where a node is slow to start
        raise ClusterError(
            f"--address {shown(address or 'local')}: no Ray cluster can be used there "
            f"({first_line(error)}): start one with 'ray start --head' and give HOST:PORT of its "
            "head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    if address is not None:
        _require_answer(address)
        ray.init(address=address, **_QUIET)
        return
    # What is started for users who did not ask for it sends nothing home.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for start in range(1, _STARTS + 1):
        try:
            ray.init(address="local", include_dashboard=False, **_QUIET)
            return
        except Exception:
            ray.shutdown()
            if start == _STARTS:
                raise


def _require_answer(address: str) -> None:
    """Refuse an address where nobody listens.

    Raises:
        OSError: Nobody does.
        ValueError: It is none.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise ValueError("it is not HOST:PORT")
    socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()


def places_for(cpus: float, gpus: float) -> int:
    """Return how many tasks of ``cpus`` cores and ``gpus`` GPUs the nodes can run at once."""
    return sum(_places(resources, cpus, gpus) for resources in _nodes())


def no_place_for(cpus: float, gpus: float) -> ClusterError:
    """Return the refusal of a cluster that cannot run even one such task."""
    nodes = [
        f"{resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs"
        for resources in _nodes()
    ]
    wanted = f"{cpus:g} cores" + (f" and {gpus:g} GPUs" if gpus else "")
    return ClusterError(
        f"a layer takes {wanted}, and no node of the cluster has as many ({'; '.join(nodes)}): "
        "set OMP_NUM_THREADS to the cores that a layer may take, --gpus-per-layer to its GPUs, "
        "or add nodes"
    )


def _places(resources: dict[str, float], cpus: float, gpus: float) -> int:
    # Shares of a GPU such as 0.1 are not exact.
    places = [int(resources.get("CPU", 0) / cpus + 1e-6)]
    places += [int(resources.get("GPU", 0) / gpus + 1e-6)] if gpus else []
    return min(places)


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
