"""Where numbers are computed, and in what: devices, dtypes and their names.

One policy for all commands: a GPU computes in whatever the model is stored in; a CPU does so where
it has instructions for that, else it computes in float32, because emulated 16-bit arithmetic is
slow. vLLM's options follow from the same rule (``serving.launch.policy``).

Pruning is the exception on a CPU: weights, hidden states, statistics and solvers are float32 there
everywhere. Only the products inside decoder layers may be computed in bfloat16, by autocast.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch

from sparseserve.errors import RecipeError
from sparseserve.machine import Machine, processor_has_bfloat16
from sparseserve.paths import shown

#: The dtypes a user can choose, by name.
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)

#: What the products inside layers can be computed in while a model is pruned.
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` without its module, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def default_device() -> torch.device:
    """Return the CUDA device if this torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_device(name: str | None) -> torch.device | None:
    """Read a device name; None stays None.

    Raises:
        RecipeError: It is not a device, or not one of this machine.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {shown(name)} is not known: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device '{name}' is not supported: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device '{name}': this torch sees no CUDA device: use --device cpu")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise RecipeError(f"device '{name}': there are {count}, numbered from 0: use --device cpu")
    return device


def computes_natively(machine: Machine, dtype: torch.dtype | None) -> bool:
    """Whether ``machine`` computes in the ``dtype`` of a checkpoint without emulating it.

    None is unknown: vLLM then takes bfloat16.
    """
    native = machine.native_float16 if dtype == torch.float16 else machine.native_bfloat16
    return machine.gpu is not None or native


def pruning_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what a model stored in ``stored`` is pruned, trained and priced in on ``device``.

    The 16-bit arithmetic of CPUs is slow where it is exact and inexact where it is not.
    """
    return torch.float32 if device.type == "cpu" else stored


def autocast_dtype(compute_dtype: str, device: torch.device) -> torch.dtype | None:
    """Return what products inside layers are rounded to on ``device``; None leaves them alone.

    By itself that is bfloat16 on a CPU which has instructions for it. A GPU runs layers in the
    dtype that they are stored in, and trains them in TF32.

    Args:
        compute_dtype: One of ``COMPUTE_DTYPES``.
        device: Where layers run.
    """
    natively = device.type == "cpu" and processor_has_bfloat16()
    chosen = compute_dtype == "bfloat16" or (compute_dtype == "auto" and natively)
    return torch.bfloat16 if chosen else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Let products in the block round their factors to ``dtype``; None lets them be.

    Sums are float32 and parameters stay what they are, so gradients arrive in their dtype. Norms,
    softmax and what adds to hidden states are not touched.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def evaluation_dtype(stored: torch.dtype | None, machine: Machine) -> torch.dtype:
    """Return what a model stored in ``stored`` (None is unknown) is evaluated in on ``machine``."""
    return stored if stored is not None and computes_natively(machine, stored) else torch.float32


def arithmetic_of(device: torch.device, autocast_to: torch.dtype | None) -> str:
    """Say what arithmetic ``device`` of this machine does: results on another may differ."""
    if device.type == "cuda":
        kind = f"cuda, {torch.cuda.get_device_name(device)}"
    else:
        kind = f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"
    if autocast_to is None:
        return kind
    emulated = device.type == "cpu" and not processor_has_bfloat16()
    return f"{kind}, {dtype_name(autocast_to)}{' emulated' if emulated else ''}"
