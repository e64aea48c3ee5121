"""Prunes a model with another tool; runs in that tool's environment and imports nothing of ours.

``benchmarks/peers/compare.py`` starts it. It gives the tool exactly the token windows of a
file, checks that the model saw those and no others, and writes a checkpoint like the dense one with
the tool's values in place of the old ones: names, dtype and ties of the dense one stay. A report
says what was used, how long the tool's own entry point took (importing, loading and
saving not counted) and how much memory the process had used by then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

WEIGHTS = "model.safetensors"
DENSE_INPUTS = "-dense-inputs"
NOT_SIDE_FILES = {WEIGHTS, "model.safetensors.index.json", "demo_source.json"}


Prune = Callable[[nn.Module, Tensor], None]


def llmcompressor(folder: Path, method: str) -> Prune:
    """``oneshot`` with one modifier; all that is not named is left at the tool's defaults.

    Its defaults: decoder layers one after the other, each on what the pruned ones before it put
    out; all linears of a layer at once; dampening 0.01, blocks of 128 columns. With the ending
    ``-dense-inputs``, its option to show every layer what the dense ones before it put out.
    """
    # Only this tool's environment has it; hence neither at the top nor known to the type checker.
    from llmcompressor import oneshot  # type: ignore[import-not-found]  # noqa: PLC0415
    from llmcompressor.modifiers.pruning import (  # type: ignore[import-not-found]  # noqa: PLC0415
        SparseGPTModifier,
        WandaPruningModifier,
    )

    kinds = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    name, dense_inputs = method.removesuffix(DENSE_INPUTS), method.endswith(DENSE_INPUTS)
    modifier = kinds[name](
        sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]
    )

    def prune(model: nn.Module, windows: Tensor) -> None:
        batches = [{"input_ids": window[None]} for window in windows]
        oneshot(
            model=model,
            tokenizer=str(folder),
            dataset=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]  # a list has all it needs
            recipe=modifier,
            **({"propagate_error": False} if dense_inputs else {}),
        )

    return prune


def modelopt(folder: Path, method: str) -> Prune:
    """``sparsify`` and ``export``; all that is not named is left at the tool's defaults.

    Its defaults: one pass through the dense model for all layers, dampening 0.1, blocks of 128
    columns. ``lm_head`` is left out.
    """
    # Only this tool's environment has it; hence neither at the top nor known to the type checker.
    import modelopt.torch.sparsity as mts  # type: ignore[import-not-found]  # noqa: PLC0415

    def prune(model: nn.Module, windows: Tensor) -> None:
        def forward_loop(dense: nn.Module) -> None:
            for window in windows:
                dense(input_ids=window[None])

        mts.sparsify(model, mode=method, config={"forward_loop": forward_loop, "verbose": True})
        mts.export(model)

    return prune


# Each imports the tool, which is not timed, and returns what is.
TOOLS: dict[str, Callable[[Path, str], Prune]] = {
    "llmcompressor": llmcompressor,
    "nvidia-modelopt": modelopt,
}


class SeenTokens:
    """Remembers the token windows that reached the embedding of a model."""

    def __init__(self, model: Any) -> None:
        self.windows: set[bytes] = set()
        model.get_input_embeddings().register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(inputs[0]) is Tensor and inputs[0].device.type == "cpu":  # not a traced stand-in
            self.windows |= {
                _bytes(window) for window in inputs[0].reshape(-1, inputs[0].shape[-1])
            }

    def require(self, windows: Tensor) -> None:
        """Raise unless exactly ``windows`` were seen."""
        if self.windows != {_bytes(window) for window in windows}:
            raise SystemExit("the tool calibrated on other tokens than it was given")


def _bytes(window: Tensor) -> bytes:
    return window.contiguous().numpy().astype("<i8").tobytes()


def digest(windows: Tensor) -> str:
    """SHA-256 of all token ids as little-endian int64, as in a calibration record."""
    return hashlib.sha256(_bytes(windows)).hexdigest()


def save_like(folder: Path, out: Path, state: dict[str, Tensor]) -> None:
    """Write ``folder``'s checkpoint to ``out`` with the values of ``state``.

    Raises:
        SystemExit: A stored tensor is not in ``state`` or has another shape, or the tool changed
            a tied output embedding.
    """
    out.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # safe_open is no mapping
                tensors[name] = _replaced(name, stored.get_tensor(name), state)
    _require_tie(tensors, state)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    for path in folder.iterdir():
        if path.is_file() and path.name not in NOT_SIDE_FILES and path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)


def _replaced(name: str, old: Tensor, state: dict[str, Tensor]) -> Tensor:
    new = state.get(name)
    if new is None or new.shape != old.shape:
        raise SystemExit(f"{name}: the tool's model has no such tensor of shape {list(old.shape)}")
    return new.to(old.dtype).contiguous()


def _require_tie(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """A tied head is not stored; what the tool made of it must then still be the embedding."""
    head = state.get("lm_head.weight")
    if head is None or "lm_head.weight" in tensors:
        return
    (embedding,) = (value for name, value in tensors.items() if "embed_tokens" in name)
    if not torch.equal(head.to(embedding.dtype), embedding):
        raise SystemExit("lm_head.weight: the tool changed an output embedding that is tied")


def load_dense(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    windows = load_file(options.windows)["windows"]
    prune = TOOLS[options.tool](options.model, options.method)
    model = load_dense(options.model)
    seen = SeenTokens(model)
    start = time.perf_counter()
    prune(model, windows)
    seconds, peak = time.perf_counter() - start, peak_memory()
    seen.require(windows)
    if options.checkpoint:
        save_like(options.model, options.checkpoint, dict(model.state_dict()))
    return {
        "tool": options.tool,
        "version": version(options.tool),
        "method": options.method,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "tokens": windows.numel(),
        "digest": digest(windows),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True, help="int64 [samples, length]")
    parser.add_argument("--tool", choices=sorted(TOOLS), required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, help="Left out: nothing is saved.")
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.report.write_text(json.dumps(run(options)), encoding="utf-8")


if __name__ == "__main__":
    main()
