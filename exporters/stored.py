"""Writing a checkpoint again in a format that stores its weights in a way of its own.

``checkpoint.formats`` names the module that knows that way; this one knows no format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import Artifact, write_manifest
from sparseserve.checkpoint.formats import require_fit
from sparseserve.checkpoint.stacks import STACKS_KEY, ExpertStack, stacks_to_json
from sparseserve.checkpoint.storage import WeightStorage, storage_of
from sparseserve.checkpoint.tensors import Checkpoint, write_checkpoint, write_json
from sparseserve.devices import dtype_name
from sparseserve.errors import ArtifactError
from sparseserve.exporters.side_files import copy_side_files, model_config


def export_stored(
    artifact: Artifact, folder: Path, name: str, dtype: torch.dtype | None, *, shard_bytes: int
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

    Raises:
        ArtifactError: The format cannot hold the pattern, the artifact is damaged, a weight is too
            large for ``dtype``, or the disk is full.
    """
    require_fit(name, artifact.manifest.pattern)
    artifact.check_hashes()
    storage = storage_of(name)
    own = _pruned_dtype(artifact)
    kept = dtype or storage.kept_dtype(own)
    dtype = None if dtype is None and kept == own else kept
    tensors = _stored_tensors(artifact, storage, dtype)
    write_checkpoint(folder, tensors, shard_bytes=shard_bytes)
    copy_side_files(artifact.path, folder)
    config = model_config(artifact.path, dtype)
    config.pop("quantization_config", None)
    pruned = artifact.manifest.pruned
    if (said := storage.quantization_config(pruned, kept)) is not None:
        stacks = stacks_to_json(artifact.manifest.stacks)
        config["quantization_config"] = {**said, STACKS_KEY: stacks} if stacks else said
    write_json(folder / "config.json", config)
    report = artifact.manifest.report
    if kept != own:
        report = {**report, "rounded": {"from": dtype_name(own), "to": dtype_name(kept)}}
    return write_manifest(folder, replace(artifact.manifest, format=name, report=report, files={}))


def dense_tensors(
    artifact: Artifact, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the dense checkpoint by name, in order, unpacking what is packed.

    Raises:
        ArtifactError: The artifact is damaged, or a weight is too large for ``dtype``.
    """
    checkpoint = artifact.checkpoint
    parts = artifact.parts(checkpoint)
    taken_apart = [stack for stack in artifact.manifest.stacks if stack.tensor not in checkpoint]
    stack_of = {module: stack for stack in taken_apart for module in stack.modules}
    for name in sorted(checkpoint.files):
        module, _, leaf = name.rpartition(".")
        if module in stack_of:
            stack = stack_of[module]
            if module == stack.modules[0] and leaf == "weight":
                whole = _put_together(artifact, checkpoint, stack)
                yield stack.tensor, _rounded(artifact, stack.tensor, whole, dtype)
        elif name not in parts:
            yield name, _rounded(artifact, name, checkpoint.tensor(name), dtype)
        elif parts[name].stands_for_all:
            module = parts[name].module
            weight = artifact.pruned_weight(checkpoint, module)
            transposed = module in artifact.manifest.transposed
            dense = f"{module}.weight"
            yield dense, _rounded(artifact, dense, weight.T if transposed else weight, dtype)


def load_dense_state(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint of any format as the tensors of the dense one.

    Raises:
        ArtifactError: The folder is not one of ours, or is damaged.
    """
    return dict(dense_tensors(Artifact.open(folder)))


def _put_together(artifact: Artifact, checkpoint: Checkpoint, stack: ExpertStack) -> Tensor:
    """Return the tensor of all experts from those of each."""
    pruned = set(artifact.manifest.pruned)
    return stack.put_together(
        (
            module,
            artifact.pruned_weight(checkpoint, module)
            if module in pruned
            else checkpoint.tensor(f"{module}.weight"),
        )
        for module in stack.modules
    )


def _stored_tensors(
    artifact: Artifact, storage: WeightStorage, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    pruned = set(artifact.manifest.pruned)
    stacks = {stack.tensor: stack for stack in artifact.manifest.stacks}
    for name, tensor in dense_tensors(artifact, dtype):
        module, _, leaf = name.rpartition(".")
        if name in stacks and not storage.keeps_stacks():
            for module in stacks[name].modules:
                weight = stacks[name].weight(tensor, *stacks[name].place(module))
                if module in pruned:
                    yield from _stored_parts(artifact, storage, module, weight)
                else:
                    yield f"{module}.weight", weight
        elif module in pruned and leaf == "weight":
            transposed = module in artifact.manifest.transposed
            weight = tensor.T if transposed else tensor
            yield from _stored_parts(artifact, storage, module, weight)
        else:
            yield name, tensor


def _stored_parts(
    artifact: Artifact, storage: WeightStorage, module: str, weight: Tensor
) -> Iterator[tuple[str, Tensor]]:
    transposed = module in artifact.manifest.transposed
    try:
        parts = storage.stored(weight, transposed=transposed)
    except ArtifactError as error:
        raise ArtifactError(f"{artifact.path}: {module}: {error}") from error
    for suffix, part in parts.items():
        yield f"{module}.{suffix}", part


def _pruned_dtype(artifact: Artifact) -> torch.dtype:
    first = artifact.manifest.pruned[:1]
    kinds = [artifact.pruned_weight(artifact.checkpoint, module).dtype for module in first]
    return kinds[0] if kinds else torch.get_default_dtype()


def _rounded(artifact: Artifact, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if tensor.isfinite().all() and not rounded.isfinite().all():
        largest = float(tensor.abs().max())
        kind = dtype_name(dtype)
        raise ArtifactError(
            f"{artifact.path}: {name} holds {largest:g}, more than {kind} can: "
            "choose another --dtype"
        )
    return rounded
