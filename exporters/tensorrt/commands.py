"""The commands that build an engine on another machine, one with a card."""

from __future__ import annotations

from collections.abc import Sequence

from sparseserve.exporters.tensorrt.settings import InputRange, TensorRTSettings

ENGINE_FILE = "model.engine"


def trtexec_command(graph: str, ranges: Sequence[InputRange]) -> str:
    """Return the trtexec line that builds the engine of ``graph``."""
    shapes = {
        "min": {item.name: item.smallest for item in ranges},
        "opt": {item.name: item.best for item in ranges},
        "max": {item.name: item.largest for item in ranges},
    }
    options = [
        f"--onnx={graph}",
        f"--saveEngine={ENGINE_FILE}",
        "--sparsity=enable",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        "--verbose",
    ]
    for kind, by_name in shapes.items():
        listed = ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in by_name.items())
        options.append(f"--{kind}Shapes={listed}")
    return f"trtexec {' '.join(options)}"


def torch_tensorrt_program(settings: TensorRTSettings, dtype: str) -> str:
    """Return a Python program that compiles the model with torch-tensorrt.

    Its first argument is the checkpoint, of any format that transformers opens.
    """
    return f"""\
import sys
import torch, torch_tensorrt
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.{dtype}).eval().cuda()
ids = torch.zeros(2, 8, dtype=torch.int64, device="cuda")
batch = torch.export.Dim("batch", min=1, max={settings.max_batch})
tokens = torch.export.Dim("tokens", min=1, max={settings.max_new})
program = torch.export.export(
    model, (), {{"input_ids": ids, "use_cache": False}},
    dynamic_shapes={{"input_ids": {{0: batch, 1: tokens}}, "use_cache": None}},
)
engine = torch_tensorrt.dynamo.compile(
    program, kwarg_inputs={{"input_ids": ids, "use_cache": False}}, sparse_weights=True
)
torch_tensorrt.save(engine, "model.ep", kwarg_inputs={{"input_ids": ids, "use_cache": False}})
"""
