"""What TensorRT says of sparsity, in lines that others published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparseserve.errors import RecipeError
from sparseserve.exporters.tensorrt.commands import trtexec_command
from sparseserve.exporters.tensorrt.settings import InputRange, TensorRTSettings, input_ranges
from sparseserve.exporters.tensorrt.sparsity_log import (
    ModuleSparsity,
    Tactic,
    module_sparsity,
)

# https://github.com/NVIDIA/TensorRT/issues/2169, a comment of 2022-07-19, middle of the list left
# out. The terminal cut the line.
PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers:"
CUT = f"""\
[07/19/2022-11:58:20] [I] [TRT] (Sparsity) Layers eligible for sparse math: Conv_22, MatMul_51, Mat
Mul_139, MatMul_149, Gemm_725
[07/19/2022-11:58:20] [I] [TRT] {PICKED}
"""
# https://github.com/NVIDIA/TensorRT/issues/4056, the beginning of the line.
FUSED = (
    "[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: MatMul_401, "
    "Conv_619 + Relu_620, Conv_622 + Relu_623, Conv_621 + Add_627 + Relu_628\n"
)
# https://github.com/NVIDIA/TensorRT/issues/1403, 2021-07-24, by the Python API of TensorRT 8.
PYTHON = """\
[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
"""
# https://github.com/pytorch/TensorRT/issues/1340, 2022-09-16.
EMPTY = f"""\
[09/16/2022-09:55:37] [I] [TRT] Total Activation Memory: 7864832
[09/16/2022-09:55:37] [I] [TRT] (Sparsity) Layers eligible for sparse math:
[09/16/2022-09:55:37] [I] [TRT] {PICKED}
[09/16/2022-09:55:38] [I] Engine built in 31.1935 sec.
"""


def answers(log: str, module: str, *tactics: Tactic) -> tuple[str, str]:
    (found,) = module_sparsity(log, tactics, [module])
    return found.eligible, found.picked


@pytest.mark.parametrize(
    ("log", "module", "expected"),
    [
        (CUT, "MatMul_51", ("yes", "no")),
        (CUT, "MatMul_139", ("yes", "no")),
        (CUT, "Gemm_725", ("yes", "no")),
        (CUT, "MatMul_5", ("no", "no")),
        (FUSED, "Conv_619", ("yes", "unknown")),
        (FUSED, "Conv_621", ("yes", "unknown")),
        (PYTHON, "Conv_0", ("yes", "no")),
        (EMPTY, "MatMul_51", ("no", "no")),
        ("", "MatMul_51", ("unknown", "unknown")),
        ("[I] [TRT] Engine built in 3 sec.", "MatMul_51", ("unknown", "unknown")),
    ],
)
def test_a_published_log_says_what_is_eligible_and_picked(
    log: str, module: str, expected: tuple[str, str]
) -> None:
    assert answers(log, module) == expected


def test_a_layer_that_stands_for_many_leaves_the_answer_open() -> None:
    log = "[I] [TRT] (Sparsity) Layers eligible for sparse math: {ForeignNode[a.b...c.d]}\n"
    assert answers(log, "a.b") == ("unknown", "unknown")


def test_the_name_of_a_tactic_is_asked_where_the_log_says_nothing() -> None:
    sparse = Tactic("m.up_proj + m.act", "sm80_xmma_gemm_sparse_f16f16_f16f16_f16_tn_n")
    dense = Tactic("m.down_proj", "sm80_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize128x128x32")
    assert module_sparsity("", [sparse, dense], ["m.up_proj", "m.down_proj", "m.other"]) == [
        ModuleSparsity("m.up_proj", "unknown", "yes", sparse.name),
        ModuleSparsity("m.down_proj", "unknown", "unknown", dense.name),
        ModuleSparsity("m.other", "unknown", "unknown", None),
    ]


def test_a_sparse_tactic_counts_though_the_log_does_not_list_it() -> None:
    assert answers(EMPTY, "m", Tactic("m", "ampere_sp_gemm")) == ("no", "yes")


def test_the_engine_takes_everything_from_one_token_to_the_largest_sizes() -> None:
    inputs = {
        "input_ids": (None, None),
        "attention_mask": (None, None),
        "past_key_values.0.key": (None, 3, None, 64),
    }
    settings = TensorRTSettings(max_batch=2, max_new=16, max_past=128)
    ranges = input_ranges(inputs, settings)
    assert ranges == [
        InputRange("input_ids", (1, 1), (1, 1), (2, 16)),
        InputRange("attention_mask", (1, 1), (1, 129), (2, 144)),
        InputRange("past_key_values.0.key", (1, 3, 0, 64), (1, 3, 128, 64), (2, 3, 128, 64)),
    ]
    command = trtexec_command("model.onnx", ranges)
    assert "--sparsity=enable" in command
    assert "--maxShapes=input_ids:2x16,attention_mask:2x144,past_key_values.0.key:2x3x128x64" in (
        command
    )


@pytest.mark.parametrize("name", ["max_batch", "max_new", "max_past"])
def test_sizes_below_one_are_refused_by_their_option(name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(RecipeError, match=f"{option} is 0, but must be at least 1"):
        replace(TensorRTSettings(), **{name: 0})  # type: ignore[arg-type]
