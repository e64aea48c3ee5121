"""From another tool's 2:4 checkpoint to one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from sparseserve.checkpoint.artifact import MANIFEST_FILE, Artifact, Manifest
from sparseserve.checkpoint.formats import FORMATS, require_fit
from sparseserve.checkpoint.run_folder import Fingerprint, RunFolder
from sparseserve.checkpoint.stacks import ExpertStack
from sparseserve.checkpoint.tensors import (
    DEFAULT_SHARD_BYTES,
    require_space,
    write_checkpoint,
    write_json,
)
from sparseserve.errors import ArtifactError
from sparseserve.exporters import EXPORTERS
from sparseserve.exporters.model_card import finish_checkpoint
from sparseserve.exporters.side_files import copy_side_files, model_config
from sparseserve.exporters.stored import export_stored
from sparseserve.foreign.codes import kept_codes
from sparseserve.foreign.source import ForeignCheckpoint
from sparseserve.huggingface.asked_size import sketch_of
from sparseserve.huggingface.experts import routers_in, unstacked_experts
from sparseserve.huggingface.names import stored_modules
from sparseserve.huggingface.opening import open_config
from sparseserve.models.model_folder import find_model_folder
from sparseserve.sparsity import TWO_FOUR
from sparseserve.workflow.model_files import base_of
from sparseserve.workflow.run import finished

# A dense weight has next to no group with two zeros; a pruned one that has nearly all was damaged.
_ALMOST = 0.5
# What other tools say of their weights in config.json, and is true no more.
_TOLD = ("quantization_config", "compression_config", "sparsity_config")


def convert(
    source: str, out: Path, export_format: str = "packed24", dtype: torch.dtype | None = None
) -> Artifact:
    """Write the 2:4 checkpoint ``source`` of another tool to the new folder ``out``.

    Linear weights that are 2:4 along their inputs count as pruned; the others stay dense. Codes of
    8 bits are kept where packed24 can hold those of all pruned weights (``foreign.codes``). Other
    quantised weights become floats: code times scale.

    Args:
        source: A folder, or a name on the Hugging Face hub.
        out: Must be absent or empty; appears whole at the end.
        export_format: How to store it.
        dtype: To round all weights to, which keeps no codes; None keeps theirs.

    Raises:
        ArtifactError: The checkpoint is ours already, damaged, of a format that is not read, or has
            no 2:4 weight, or one that is only almost 2:4.
        UnsupportedModelError: transformers does not know the model.
    """
    require_fit(export_format, str(TWO_FOUR))
    folder = find_model_folder(source)
    if (folder / MANIFEST_FILE).exists():
        raise ArtifactError(
            f"{folder}: is a checkpoint of sparseserve: sparseserve export {folder} -o {out} "
            f"--format {export_format}"
        )
    foreign = ForeignCheckpoint.open(folder)
    model = sketch_of(folder, open_config(folder), len(foreign.checkpoint.files))
    with RunFolder.claim(out) as run:
        require_space(run.path, 4 * foreign.checkpoint.weight_bytes)
        fingerprint = {"format": export_format, "dtype": str(dtype), "source": source}
        if run.begin(Fingerprint(fingerprint)):
            return finished(out, export_format)
        artifact = _write_dense(run.fresh("dense"), foreign, model, source)
        if export_format != "dense" or dtype is not None:
            folder = run.fresh(export_format + "-out")
            artifact = _exported(artifact, foreign, folder, export_format, dtype)
        run.publish(artifact.path)
    return replace(artifact, path=out)


def _exported(
    dense: Artifact,
    foreign: ForeignCheckpoint,
    folder: Path,
    export_format: str,
    dtype: torch.dtype | None,
) -> Artifact:
    if FORMATS[export_format].quantizes and dtype is None:
        quantization, scales = kept_codes(foreign, dense.manifest.pruned)
        if quantization:
            return export_stored(
                dense,
                folder,
                export_format,
                None,
                shard_bytes=DEFAULT_SHARD_BYTES,
                quantization=quantization,
                scales=scales,
            )
    return EXPORTERS[export_format](dense, folder, dtype)


@dataclass(slots=True)
class _Seen:
    """What was found while the tensors went by."""

    names: set[str] = field(default_factory=set)
    pruned: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)


def _write_dense(
    folder: Path, foreign: ForeignCheckpoint, model: PreTrainedModel, source: str
) -> Artifact:
    linears = _Linears.of(model)
    seen = _Seen()
    write_checkpoint(folder, _watched(foreign, linears, seen))
    if missing := sorted(_expected(model) - seen.names):
        raise ArtifactError(
            f"{foreign.folder}: {missing[0]} is missing ({len(missing)} tensors are): "
            "download it again"
        )
    if not seen.pruned:
        raise ArtifactError(
            f"{foreign.folder}: none of its {len(seen.dense)} linear weights is {TWO_FOUR}: "
            f"sparseserve prune-and-export {source} -o OUT prunes it"
        )
    copy_side_files(foreign.folder, folder)
    config = model_config(foreign.folder)
    for key in _TOLD:
        config.pop(key, None)
    write_json(folder / "config.json", config)
    converted = {"formats": list(foreign.formats), "dense_linears": seen.dense}
    manifest = Manifest(
        format="dense",
        pattern=str(TWO_FOUR),
        pruned=tuple(seen.pruned),
        transposed=tuple(name for name in seen.pruned if linears.transposed.get(name)),
        source=source,
        recipe={},
        calibration={},
        report={"converted": converted, **base_of(source, foreign.folder)},
        files={},
        stacks=tuple(
            stack
            for stack in linears.stacks.values()
            if not set(seen.pruned).isdisjoint(stack.modules)
        ),
    )
    return finish_checkpoint(folder, manifest)


@dataclass(frozen=True, slots=True)
class _Linears:
    """The linears of a model as a dense checkpoint stores them, but the output head.

    Attributes:
        transposed: Names on disk of those with a weight of their own, and whether it is stored
            transposed.
        stacks: Tensors that hold experts, by name.
    """

    transposed: dict[str, bool]
    stacks: dict[str, ExpertStack]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Linears:
        """Find them in a sketch of the model."""
        head = model.get_output_embeddings()
        with unstacked_experts(model):
            routers = routers_in(model)
            kinds = {
                name: isinstance(module, Conv1D)
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear | Conv1D)
                and module is not head
                and name not in routers
            }
        places = stored_modules(model, list(kinds))
        return cls(
            {place.name: kinds[name] for name, place in places.items() if place.stack is None},
            {place.stack.tensor: place.stack for place in places.values() if place.stack},
        )

    def weights(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights ``[out, in]`` of linears that a tensor of a checkpoint holds."""
        if stack := self.stacks.get(name):
            for module in stack.modules:
                yield module, stack.weight(tensor, *stack.place(module))
        module = name.removesuffix(".weight")
        if name != module and module in self.transposed:
            yield module, tensor.T if self.transposed[module] else tensor


def _watched(
    foreign: ForeignCheckpoint, linears: _Linears, seen: _Seen
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, and note what linear weights are."""
    for name, tensor in foreign.tensors():
        seen.names.add(name)
        for module, weight in linears.weights(name, tensor):
            pruned = _is_two_four(f"{foreign.folder}: {module}", weight, module in foreign.modules)
            (seen.pruned if pruned else seen.dense).append(module)
        yield name, tensor


def _is_two_four(name: str, weight: Tensor, promised: bool) -> bool:
    """Whether ``weight`` ``[out, in]`` is 2:4; ``promised`` says that its format holds no other.

    Raises:
        ArtifactError: It almost is.
    """
    if weight.ndim != 2 or weight.shape[1] % TWO_FOUR.group:
        return False
    violation = TWO_FOUR.first_violation(weight)
    if violation is None:
        return True
    share = float((TWO_FOUR.nonzeros(weight) <= TWO_FOUR.keep).float().mean())
    if promised or share > _ALMOST:
        raise ArtifactError(
            f"{name} is almost {TWO_FOUR} ({share:.1%} of its groups), but not at {violation}: "
            "download or prune it again"
        )
    return False


def _expected(model: PreTrainedModel) -> set[str]:
    """Return the names on disk of all parameters, but of those tied to others."""
    tied = set(model.all_tied_weights_keys)
    own = {name: tensor for name, tensor in model.named_parameters() if name not in tied}
    return set(revert_weight_conversion(model, own))
