"""How long do windows take through a decoder layer in float32 and in bfloat16?

The layer runs as pruning runs it, once forwards and once as reconstruction trains it, with one
window of 512 tokens. The two dtypes take turns::

    python -m benchmarks.quality.compute_dtype demo/models/smollm2-135m \
        demo/models/qwen2.5-coder-1.5b

What becomes of the perplexity is a question for ``benchmarks.quality.compare``, by variants that
end with ``,float32`` and ``,bfloat16``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, write_result
from sparseserve.cli.console import quiet_libraries
from sparseserve.devices import autocast_dtype
from sparseserve.layerwise.reconstruction import RelativeError
from sparseserve.models.hooks import hidden_output
from sparseserve.models.layer_call import LayerCall
from sparseserve.models.layers import capture_layer_calls, copy_layer, entering_states, run_layer
from sparseserve.models.loading import load_model
from sparseserve.models.structure import trace_structure
from sparseserve.serving.kernels.choice.timing import medians_in_turns
from sparseserve.text import read_text
from sparseserve.text.windows import evaluation_windows

_CPU = torch.device("cpu")
_DTYPES = ("float32", "bfloat16")
_RESULT = "compute-dtype.json"


@dataclass(frozen=True, slots=True)
class Row:
    """Median seconds of a window through the first layer of a model."""

    model: str
    compute_dtype: str
    forward_seconds: float
    training_seconds: float


def measure(model: str, tokens: int) -> list[Row]:
    """Time the first layer of ``model`` in each dtype."""
    loaded = load_model(model)
    source = read_text(None, packaged="calibration")
    windows = evaluation_windows(loaded.tokenizer, source, sequence_length=tokens, samples=2)
    structure = trace_structure(loaded.model, windows[0][:8])
    name = structure.layers[0].name
    call = capture_layer_calls(loaded.model, structure, windows)[0].to(_CPU, torch.float32)
    [hidden] = entering_states(loaded.model, structure, windows[:1])
    layer = copy_layer(loaded.model.get_submodule(name), _CPU, torch.float32)
    calls = {dtype: replace(call, autocast_to=autocast_dtype(dtype, _CPU)) for dtype in _DTYPES}
    forward = medians_in_turns(
        {dtype: partial(run_layer, layer, hidden.float(), one) for dtype, one in calls.items()},
        [],
    )
    layer.requires_grad_(True)
    training = medians_in_turns(
        {dtype: partial(_step, layer, hidden.float(), one) for dtype, one in calls.items()},
        [],
    )
    return [Row(Path(model).name, dtype, forward[dtype], training[dtype]) for dtype in _DTYPES]


def _step(layer: nn.Module, hidden: Tensor, call: LayerCall) -> None:
    layer.zero_grad()
    output = hidden_output(call.apply(layer, hidden))
    assert output is not None
    error = RelativeError(None).of(output, hidden, 0)
    torch.autograd.backward([error])


def compute_dtype_table(result: Result) -> str:
    """Milliseconds of each, and the share that bfloat16 takes."""
    lines = [head("model", "step", *_DTYPES, "bfloat16 / float32")]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        found = {row["compute_dtype"]: row for row in result["rows"] if row["model"] == model}
        for step, key in (("forwards", "forward_seconds"), ("training", "training_seconds")):
            wide, narrow = (found[dtype][key] for dtype in _DTYPES)
            times = (f"{1000 * seconds:.0f} ms" for seconds in (wide, narrow))
            lines.append(line(f"`{model}`", step, *times, f"{narrow / wide:.2f}"))
    lines.append(
        f"\nOne window of {result['setting']['tokens']} tokens through the first decoder layer, "
        f"medians in turns, {result['machine']['threads']} threads; "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--tokens", default=512, show_default=True, help="Of the window.")
@click.option("--result", default=_RESULT, show_default=True, help="Name of the JSON.")
def main(models: tuple[str, ...], tokens: int, result: str) -> None:
    """Time the first layer of each of MODELS."""
    quiet_libraries()
    rows = [row for model in models for row in measure(model, tokens)]
    for row in rows:
        click.echo(row)
    write_result(RESULTS / result, {"tokens": tokens}, rows=rows)


if __name__ == "__main__":
    main()
