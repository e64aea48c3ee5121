"""Opening a ``semi_structured`` checkpoint on the sparse tensor cores of an NVIDIA card.

Not yet run on hardware: on a CPU the same calls run torch's class on reference operators.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured
from transformers import PreTrainedModel

from sparseserve.checkpoint import semi_structured
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.tensors import Checkpoint
from sparseserve.errors import ArtifactError
from sparseserve.huggingface.checkpoint_model import open_checkpoint
from sparseserve.huggingface.names import stored_name

_CUTLASS_MAJOR = 8  # torch's CUTLASS kernels are for compute capability 8.x


def load_semi_structured(folder: str | Path, device: str | torch.device) -> PreTrainedModel:
    """Open a ``semi_structured`` checkpoint with torch's sparse kernels where ``device`` has them.

    A card of compute capability 8.x multiplies with the tensors as they are stored. Any other card
    of NVIDIA gets its own form through ``torch.sparse.to_sparse_semi_structured``. A CPU, and every
    module that torch's limits exclude, gets the dense weights.

    Args:
        folder: Made by ``sparseserve export --format semi_structured``.
        device: Where to, such as ``cuda`` or ``cpu``.

    Returns:
        A transformers model in evaluation mode, without gradients.

    Raises:
        ArtifactError: The folder holds another format, or is damaged.
        UnsupportedModelError: transformers cannot build the model.
    """
    path, device = Path(folder), torch.device(device)
    manifest = Artifact.open(path).manifest
    if manifest.format != semi_structured.FORMAT:
        raise ArtifactError(
            f"{path}: its format is {manifest.format}, not {semi_structured.FORMAT}: "
            f"sparseserve export {path} -o OUT --format {semi_structured.FORMAT}"
        )
    model = open_checkpoint(path)
    if device.type == "cuda":
        as_stored = torch.cuda.get_device_capability(device)[0] == _CUTLASS_MAJOR
        make_sparse(model, path, device, as_stored=as_stored)
    return model.to(device)


def make_sparse(
    model: PreTrainedModel, folder: Path, device: torch.device, *, as_stored: bool
) -> None:
    """Put torch's sparse tensors in the place of the dense weights that ``folder`` has sparse.

    Args:
        model: Opened from ``folder``, on any device.
        folder: A ``semi_structured`` checkpoint.
        device: Where the sparse tensors go.
        as_stored: Whether to take CUTLASS's tensors as they are, else torch compresses again.
    """
    checkpoint = Artifact.open(folder).checkpoint
    linears = [item for item in model.named_modules() if isinstance(item[1], nn.Linear)]
    for name, module in linears:
        stored_as = stored_name(model, name)
        if f"{stored_as}.{semi_structured.META}" not in checkpoint:
            continue
        if as_stored:
            weight = wrap(checkpoint, str(stored_as), device)
        else:
            weight = to_sparse_semi_structured(module.weight.detach().to(device))
        module.weight = nn.Parameter(weight, requires_grad=False)


def wrap(checkpoint: Checkpoint, module: str, device: torch.device) -> Tensor:
    """Return the weight ``[out, in]`` of ``module`` as torch's CUTLASS tensor, as it is stored."""
    packed, meta = (
        checkpoint.tensor(name).to(device) for name in semi_structured.names(checkpoint, module)
    )
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    return SparseSemiStructuredTensorCUTLASS(shape, packed, meta, None, None, None)
