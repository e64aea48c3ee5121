"""How a checkpoint of each format is opened and served: commands that are shown to people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from sparseserve.sparsity import TWO_FOUR


@dataclass(frozen=True, slots=True)
class Use:
    """One way to use a checkpoint.

    Attributes:
        title: With what program.
        note: What to know about it.
        language: Of ``code``: python or sh.
        code: Lines to run.
    """

    title: str
    note: str
    language: str
    code: str


def uses_of(name: str, pattern: str, folder: str) -> tuple[Use, ...]:
    """Return the ways to use a checkpoint; none of a format that ``_USES`` does not know.

    Args:
        name: Its format.
        pattern: What its pruned weights obey.
        folder: What it is called in the commands.
    """
    known = _USES.get(name)
    return known(folder, pattern == str(TWO_FOUR)) if known else ()


def _packed24(folder: str, two_four: bool) -> tuple[Use, ...]:
    return (
        _transformers(
            folder, "sparseserve must be installed, nothing of it has to be imported. " + _DENSE
        ),
        Use(
            "vLLM",
            "2:4 layers run on sparse kernels where these are faster on the machine. With "
            "sparseserve installed, `vllm serve` understands the folder as well.",
            "sh",
            f"sparseserve serve {shlex.quote(folder)}",
        ),
    )


def _semi_structured(folder: str, two_four: bool) -> tuple[Use, ...]:
    load = f'model = load_semi_structured({json.dumps(folder)}, "cuda")'
    return (
        Use(
            "torch's sparse kernels",
            "On NVIDIA cards of compute capability 8.x torch multiplies with the weights as they "
            "are stored.",
            "python",
            f"from sparseserve import load_semi_structured\n\n{load}",
        ),
        _transformers(
            folder, "sparseserve must be installed, nothing of it has to be imported. " + _DENSE
        ),
        Use(
            "vLLM",
            "vLLM does not read this format. Export it as packed24 first.",
            "sh",
            f"sparseserve export {shlex.quote(folder)} -o PACKED --format packed24\n"
            "sparseserve serve PACKED",
        ),
    )


def _dense(folder: str, two_four: bool) -> tuple[Use, ...]:
    quoted = shlex.quote(folder)
    plain = Use("vLLM", "All layers run dense.", "sh", f"vllm serve {quoted}")
    sparse = Use(
        "vLLM",
        "With sparseserve installed, 2:4 layers run on sparse kernels. Without the option at the "
        "end all layers run dense.",
        "sh",
        f"sparseserve serve {quoted} -- --quantization sparseserve",
    )
    return (
        _transformers(folder, "Nothing else is needed: zeros are stored like other values."),
        sparse if two_four else plain,
    )


def _onnx(folder: str, two_four: bool) -> tuple[Use, ...]:
    return (
        Use(
            "onnxruntime-genai",
            "The graph also runs in onnxruntime itself. ONNX has no sparse weights: the zeros are "
            "stored.",
            "python",
            "import onnxruntime_genai\n\n"
            f"model = onnxruntime_genai.Model({json.dumps(folder)})\n"
            "tokenizer = onnxruntime_genai.Tokenizer(model)",
        ),
        _NOT_VLLM,
    )


def _tensorrt(folder: str, two_four: bool) -> tuple[Use, ...]:
    return (
        Use(
            "TensorRT",
            "If there is no engine in the folder, the command that builds one is in build.json.",
            "sh",
            f"python -m json.tool {shlex.quote(f'{folder}/build.json')}",
        ),
        _NOT_VLLM,
    )


def _transformers(folder: str, note: str) -> Use:
    name = json.dumps(folder)
    return Use(
        "transformers",
        note,
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})",
    )


_DENSE = "The result is the dense model, zeros included, and takes its memory."
_NOT_VLLM = Use(
    "vLLM",
    "vLLM does not read this format. Serve the checkpoint that it was exported from.",
    "sh",
    "sparseserve serve CHECKPOINT",
)
_USES: dict[str, Callable[[str, bool], tuple[Use, ...]]] = {
    "packed24": _packed24,
    "semi_structured": _semi_structured,
    "dense": _dense,
    "onnx": _onnx,
    "tensorrt": _tensorrt,
}
