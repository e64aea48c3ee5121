"""How much of a pruned model would torch-tensorrt put into an engine?

Its dry run partitions a model and converts nothing, which needs no card. The package refuses to be
imported where there is none, so parts of CUDA that only describe a device are made up, and its
compiled half is left out, as in a "python-only" build. No engine is built and nothing is timed. ::

    python -m benchmarks.exports.torch_tensorrt_dry_run
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor, nn

from benchmarks.harness.results import RESULTS, write_result
from sparseserve import Job, prune_and_export
from sparseserve.huggingface.checkpoint_model import open_checkpoint
from sparseserve.pruners.magnitude import Magnitude
from sparseserve.recipe.toml import UNTRAINED
from sparseserve.testing import save_tiny_model

# Of the release that fits the installed torch; TensorRT-RTX is the one that installs without CUDA.
PACKAGES = (
    "torch-tensorrt-rtx==2.13.0",
    "dllist",
    "tensorrt-rtx-cu13==1.7.1.116",
    "tensorrt-rtx-cu13-bindings==1.7.1.116",
    "tensorrt-rtx-cu13-libs==1.7.1.116",
)
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2")
UNTRAINED_QUICKLY = replace(
    UNTRAINED,
    pruner=Magnitude(),
    calibration=replace(UNTRAINED.calibration, samples=2, sequence_length=16),
)
IDS = torch.arange(10, 42)[None]
FOUND = re.compile(r"consists of (\d+) Total Operators, of which (\d+) operators are supported")
_MEMORY = 2**33


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the dry run says of a tiny 2:4 model in float16."""

    family: str
    operators: int
    supported: int
    engines: int


class Logits(nn.Module):
    """A causal language model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@contextmanager
def importable(place: Path) -> Iterator[None]:
    """Install the packages into ``place``, without what needs a card, and describe a card."""
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
    subprocess.run([*command, "--target", str(place), *PACKAGES], check=True)
    for library in (place / "torch_tensorrt").rglob("*.so*"):
        library.unlink()
    shutil.rmtree(place / "torch_tensorrt" / "bin", ignore_errors=True)
    card = SimpleNamespace(
        name="none", major=8, minor=0, total_memory=_MEMORY, multi_processor_count=1
    )
    described: dict[str, Any] = {
        "get_device_capability": lambda *_, **__: (8, 0),
        "get_device_properties": lambda *_, **__: card,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: card.name,
        "set_device": lambda *_: None,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
    }
    sys.path.insert(0, str(place))
    with (
        patch.multiple(torch.cuda, **described),
        patch.object(torch._C, "_CudaDeviceProperties", SimpleNamespace, create=True),
    ):
        yield


def dry_run(family: str, place: Path) -> Row:
    """Prune a tiny model of ``family`` and let torch-tensorrt look at it."""
    import torch_tensorrt  # noqa: PLC0415  # it is installed by this script

    source = save_tiny_model(family, place / "source")
    artifact = prune_and_export(Job(str(source), UNTRAINED_QUICKLY), place / "pruned")
    model = Logits(open_checkpoint(artifact.path, torch.float16)).eval()
    said = place / "dry-run.txt"
    torch_tensorrt.dynamo.compile(
        torch.export.export(model, (IDS,)),
        inputs=[IDS],
        dryrun=str(said),
        sparse_weights=True,
        min_block_size=1,
        offload_module_to_cpu=True,
    )
    text = said.read_text(encoding="utf-8")
    found = FOUND.search(text)
    if found is None:
        raise click.ClickException(f"{family}: torch-tensorrt does not say what it found")
    engines = len(re.findall(r"TRT Engine #\d+", text))
    return Row(family=family, operators=int(found[1]), supported=int(found[2]), engines=engines)


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=RESULTS / "torch-tensorrt.json"
)
def main(output: Path) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch, importable(Path(scratch) / "packages"):
        for family in FAMILIES:
            place = Path(scratch) / family
            place.mkdir()
            rows.append(dry_run(family, place))
            click.echo(asdict(rows[-1]))
    write_result(output, {"packages": PACKAGES, "dtype": "float16"}, rows=rows)


if __name__ == "__main__":
    main()
