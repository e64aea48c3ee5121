"""Writing a checkpoint again in a format that stores its weights in a way of its own.

``checkpoint.formats`` names the module that knows that way; this one knows no format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import Artifact, Manifest
from sparseserve.checkpoint.formats import FORMATS, require_fit
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.checkpoint.stacks import STACKS_KEY, ExpertStack, stacks_to_json
from sparseserve.checkpoint.storage import quantized_storage_of, storage_of
from sparseserve.checkpoint.tensors import DEFAULT_SHARD_BYTES, Checkpoint, write_checkpoint
from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError
from sparseserve.exporters.model_card import finish_checkpoint
from sparseserve.exporters.side_files import (
    copy_side_files,
    model_config,
    with_dtype,
    write_config,
)
from sparseserve.report import QuantizationReport


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSource:
    """What a checkpoint is made of.

    Attributes:
        folder: Holds the files that go with the weights.
        config: What config.json is to say; nothing of how weights are stored.
        manifest: Which weights are pruned, how and from what; its format and files do not count.
        dtype: Of the pruned weights.
        tensors: All of the dense model by name, in the order in which they are to be written.
        quantization: How pruned weights are to be rounded, where the format can.
        scales: By module, of the weights that are rounded so already, ``[out, groups]``; others are
            rounded to the nearest.
    """

    folder: Path
    config: dict[str, object]
    manifest: Manifest
    dtype: torch.dtype
    tensors: Iterable[tuple[str, Tensor]]
    quantization: Quantization = field(default_factory=Quantization)
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def export_stored(
    artifact: Artifact,
    folder: Path,
    name: str,
    dtype: torch.dtype | None,
    *,
    shard_bytes: int,
    quantization: Quantization | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> Artifact:
    """Write ``artifact``, of any format, to the new ``folder`` in the format ``name``.

    The hashes of ``artifact`` are compared first: the copy gets hashes of its own, which must not
    vouch for damage.

    Args:
        artifact: What to write.
        folder: Where.
        name: The format, a name of ``FORMATS``.
        dtype: To round all weights to; None keeps theirs, where the format can.
        shard_bytes: Largest size of a file.
        quantization: How to round pruned weights; None keeps what was done to them, where the
            format can hold it.
        scales: By module, of weights that are codes times these, ``[out, groups]``.

    Raises:
        ArtifactError: The format cannot hold the pattern, the artifact is damaged, a weight is too
            large for ``dtype``, or the disk is full.
        RecipeError: The format holds no quantised weights.
    """
    require_fit(name, artifact.manifest.pattern, quantization)
    artifact.check_hashes()
    quantised, own = _quantised(artifact)
    if scales is None:
        scales = own if quantization in (None, quantised) else {}
    config = model_config(artifact.path)
    config.pop("quantization_config", None)
    source = DenseSource(
        folder=artifact.path,
        config=config,
        manifest=artifact.manifest,
        dtype=_pruned_dtype(artifact),
        tensors=dense_tensors(artifact),
        quantization=quantised if quantization is None else quantization,
        scales=scales,
    )
    return write_stored(source, folder, name, dtype, shard_bytes=shard_bytes)


def write_stored(
    source: DenseSource,
    folder: Path,
    name: str,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Artifact:
    """Write ``source`` to the new ``folder`` in the format ``name``.

    Args:
        source: What to write.
        folder: Where.
        name: The format, a name of ``FORMATS`` that has a storage.
        dtype: To round all weights to; None keeps theirs, where the format can.
        shard_bytes: Largest size of a file.

    Raises:
        ArtifactError: A weight is too large for ``dtype``, or the disk is full.
    """
    storage, quantized = storage_of(name), quantized_storage_of(name)
    kept = dtype or storage.kept_dtype(source.dtype)
    dtype = None if dtype is None and kept == source.dtype else kept
    write_checkpoint(folder, _stored_tensors(source, name, dtype), shard_bytes=shard_bytes)
    copy_side_files(source.folder, folder)
    config = source.config if dtype is None else with_dtype(source.config, dtype)
    manifest = source.manifest
    said: Mapping[str, object] | None
    if quantized:
        said = quantized.quantization_config(manifest.pruned, kept, source.quantization)
    else:
        said = storage.quantization_config(manifest.pruned, kept)
    if said is not None:
        stacks = stacks_to_json(manifest.stacks)
        said = {**said, STACKS_KEY: stacks} if stacks else said
        config = {**config, "quantization_config": said}
    write_config(source.folder, folder, config)
    report = manifest.report
    if kept != source.dtype:
        report = {**report, "rounded": {"from": dtype_name(source.dtype), "to": dtype_name(kept)}}
    if quantized and source.quantization and not source.scales:
        to, size = source.quantization.to, source.quantization.group_size
        report = {**report, "quantization": asdict(QuantizationReport(to, size))}
    return finish_checkpoint(folder, replace(manifest, format=name, report=report, files={}))


def dense_tensors(artifact: Artifact) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense checkpoint by name, in order, unpacking what is packed.

    Raises:
        ArtifactError: The artifact is damaged.
    """
    checkpoint = artifact.checkpoint
    parts = artifact.parts(checkpoint)
    rounded_to = _quantised_dtype(artifact)
    taken_apart = [stack for stack in artifact.manifest.stacks if stack.tensor not in checkpoint]
    stack_of = {module: stack for stack in taken_apart for module in stack.modules}
    for name in sorted(checkpoint.files):
        module, _, leaf = name.rpartition(".")
        if module in stack_of:
            stack = stack_of[module]
            if module == stack.modules[0] and leaf == "weight":
                yield stack.tensor, _put_together(artifact, checkpoint, stack, rounded_to)
        elif name not in parts:
            yield name, checkpoint.tensor(name)
        elif parts[name].stands_for_all:
            module = parts[name].module
            weight = artifact.pruned_weight(checkpoint, module).to(rounded_to)
            transposed = module in artifact.manifest.transposed
            yield f"{module}.weight", weight.T if transposed else weight


def load_dense_state(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint of any format as the tensors of the dense one.

    Raises:
        ArtifactError: The folder is not one of ours, or is damaged.
    """
    return dict(dense_tensors(Artifact.open(folder)))


def _put_together(
    artifact: Artifact, checkpoint: Checkpoint, stack: ExpertStack, dtype: torch.dtype | None
) -> Tensor:
    """Return the tensor of all experts from those of each."""
    pruned = set(artifact.manifest.pruned)
    return stack.put_together(
        (
            module,
            artifact.pruned_weight(checkpoint, module).to(dtype)
            if module in pruned
            else checkpoint.tensor(f"{module}.weight"),
        )
        for module in stack.modules
    )


def _quantised(artifact: Artifact) -> tuple[Quantization, dict[str, Tensor]]:
    """Return how the weights of ``artifact`` are rounded, and their scales by module."""
    storage = quantized_storage_of(artifact.manifest.format)
    if storage is None:
        return Quantization(), {}
    checkpoint = artifact.checkpoint
    scales = storage.stored_scales(checkpoint, artifact.manifest.pruned)
    return storage.stored_quantization(checkpoint), scales


def _stored_tensors(
    source: DenseSource, name: str, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    storage = storage_of(name)
    pruned = set(source.manifest.pruned)
    stacks = {stack.tensor: stack for stack in source.manifest.stacks}
    for tensor_name, exact in source.tensors:
        tensor = exact if dtype is None else _rounded(source.folder, tensor_name, exact, dtype)
        module, _, leaf = tensor_name.rpartition(".")
        # Codes are made of the weights as they were, whatever the dtype of the others becomes.
        whole = exact if source.quantization and FORMATS[name].quantizes else tensor
        if tensor_name in stacks and not storage.keeps_stacks():
            stack = stacks[tensor_name]
            for module in stack.modules:
                place = stack.place(module)
                if module in pruned:
                    yield from _stored_parts(source, name, module, stack.weight(whole, *place))
                else:
                    yield f"{module}.weight", stack.weight(tensor, *place)
        elif module in pruned and leaf == "weight":
            transposed = module in source.manifest.transposed
            yield from _stored_parts(source, name, module, whole.T if transposed else whole)
        else:
            yield tensor_name, tensor


def _stored_parts(
    source: DenseSource, name: str, module: str, weight: Tensor
) -> Iterator[tuple[str, Tensor]]:
    quantized = quantized_storage_of(name)
    transposed = module in source.manifest.transposed
    try:
        if quantized and source.quantization:
            scale = source.scales.get(module)
            parts = quantized.stored_quantized(weight, source.quantization, scale)
        else:
            parts = storage_of(name).stored(weight, transposed=transposed)
    except ArtifactError as error:
        raise ArtifactError(f"{source.folder}: {module}: {error}") from error
    for suffix, part in parts.items():
        yield f"{module}.{suffix}", part


def _pruned_dtype(artifact: Artifact) -> torch.dtype:
    if (dtype := _quantised_dtype(artifact)) is not None:
        return dtype
    first = artifact.manifest.pruned[:1]
    kinds = [artifact.pruned_weight(artifact.checkpoint, module).dtype for module in first]
    return kinds[0] if kinds else torch.get_default_dtype()


def _quantised_dtype(artifact: Artifact) -> torch.dtype | None:
    """Return what quantised weights are rounded to when they are read; None if there are none."""
    storage = quantized_storage_of(artifact.manifest.format)
    return storage.quantized_dtype(artifact.checkpoint) if storage else None


def _rounded(folder: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if tensor.isfinite().all() and not rounded.isfinite().all():
        largest = float(tensor.abs().max())
        kind = dtype_name(dtype)
        raise ArtifactError(
            f"{folder}: {name} holds {largest:g}, more than {kind} can: choose another --dtype"
        )
    return rounded
