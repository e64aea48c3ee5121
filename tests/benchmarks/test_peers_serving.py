"""What the comparison with other servers makes and prints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.peers.dense_int8 import write_dense_int8
from benchmarks.peers.tables import peers_serving_table
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan


def test_the_dense_model_in_eight_bits_is_within_half_a_step_of_each_weight(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "dense")
    operators = frozenset(name for name, _ in plan(Job(str(model))).operators)
    out = write_dense_int8(model, tmp_path / "int8", operators)
    dense, codes = (load_file(folder / "model.safetensors") for folder in (model, out))
    assert {name.removesuffix("_scale") for name in codes} == dense.keys()
    for name, weight in dense.items():
        if name.removesuffix(".weight") not in operators:
            assert torch.equal(codes[name], weight.bfloat16())
            continue
        scale = codes[f"{name}_scale"].float()
        assert codes[name].dtype == torch.int8
        assert scale.shape == (len(weight), 1)
        # The scale itself is rounded to bfloat16, which the largest codes feel most.
        assert ((codes[name] * scale - weight).abs() <= scale * (0.5 + 127 / 256)).all()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_the_table_has_a_line_for_each_system() -> None:
    system = {
        "program": "llama.cpp",
        "weights": "Q8_0",
        "threads": 2,
        "disk_bytes": 145_000_000,
        "memory_bytes": 301_400_000,
        "perplexity": 19.487,
        "prompt_tokens_per_second": 812.4,
        "new_tokens_per_second": {"1": 70.04, "8": 201.6},
    }
    served = {**system, "program": "vLLM", "weights": "dense, bfloat16", "threads": None}
    setting = {
        "model": "smollm2",
        "text": "demo/texts/wikipedia-evaluation.txt",
        "windows": 16,
        "batch_sizes": [1, 8],
        "input_lengths": [128],
        "output_length": 32,
        "repeats": 5,
    }
    machine = {"cpu": "a processor, 2 cores", "torch": "2.13.0", "commit": "abc", "date": "today"}
    table = peers_serving_table(
        {"setting": setting, "machine": machine, "systems": [system, served]}
    )
    _, _, first, second, _, note = table.splitlines()
    assert first == "| llama.cpp | Q8_0 | 2 | 145 | 301 | 812 | 70 | 202 | 19.49 |"
    assert second.startswith("| vLLM | dense, bfloat16 | as its server | 145 |")
    assert "of wikipedia-evaluation.txt" in note
