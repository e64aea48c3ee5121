"""Programs that never heard of sparseserve, and a packed24 checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparseserve.errors import ArtifactError
from sparseserve.exporters import EXPORTERS
from sparseserve.testing import EXPERT_TINY_FAMILIES, MORE_TINY_FAMILIES, TINY_FAMILIES
from tests.integration.conftest import Prune
from tests.selection import representatives, selected

SCRIPT = Path(__file__).parent / "plain_transformers.py"
VERSION_1 = Path(__file__).parents[1] / "data" / "packed24-version-1"
FAMILIES = (*TINY_FAMILIES, *MORE_TINY_FAMILIES, *EXPERT_TINY_FAMILIES)
# Plain, transposed, renamed, with a tensor for each expert and with one for all.
REPRESENTATIVES = ("llama", "gpt2", "gemma3", "mixtral", "gpt_oss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# transformers' own code for Mamba warns that it is slow.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


def python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def opening(*before: str) -> str:
    """Return a program that opens the folder of its first argument, after the lines ``before``."""
    opened = "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    return "\n".join(
        ["import sys", *before, "from transformers import AutoModelForCausalLM", opened]
    )


Pairs = dict[str, Path]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prune_into: Prune
) -> Pairs:
    """Return, by family and dtype, a folder with a packed and a dense export of one model."""
    root = tmp_path_factory.mktemp("pairs")
    found = {}
    for family in {"llama", *selected(request, "family")}:
        artifact = prune_into(root / family, family)
        for name, dtype in DTYPES.items():
            place = found[f"{family} {name}"] = root / f"{family}-{name}"
            for form in ("packed24", "dense"):
                folder = place / ("packed" if form == "packed24" else form)
                EXPORTERS[form](artifact, folder, dtype)
    return found


@pytest.fixture(scope="module")
def compared(pairs: Pairs) -> dict[str, dict[str, list[str]]]:
    """Return which tensors differ, by family and dtype, in a program with plain transformers."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, pairs.values())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return {name: results[str(folder)] for name, folder in pairs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", representatives(FAMILIES, REPRESENTATIVES))
def test_a_packed_model_is_its_dense_export_bit_for_bit_and_is_saved_as_such(
    compared: dict[str, dict[str, list[str]]], family: str, dtype: str
) -> None:
    assert compared[f"{family} {dtype}"] == {"packed": [], "saved": []}


@pytest.mark.parametrize(
    "before",
    [
        (),
        ("import transformers.quantizers.auto",),
        pytest.param(
            ("from transformers.models.llama.modeling_llama import LlamaForCausalLM",),
            marks=pytest.mark.further,
        ),
        pytest.param(("from transformers import pipeline",), marks=pytest.mark.further),
        pytest.param(("import torch",), marks=pytest.mark.further),
    ],
    ids=lambda lines: "; ".join(lines) or "at once",
)
def test_whatever_a_program_imports_first_the_model_is_opened(
    pairs: Pairs, before: tuple[str, ...]
) -> None:
    done = python(opening(*before), str(pairs["llama float32"] / "packed"))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("before", ["", "import transformers.quantizers.auto; "])
def test_without_the_autoload_of_torch_an_import_of_sparseserve_does_the_same(
    pairs: Pairs, before: str
) -> None:
    folder = str(pairs["llama float32"] / "packed")
    done = python(opening(f"{before}import sparseserve"), folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_program_without_sparseserve_stops_instead_of_guessing(pairs: Pairs) -> None:
    folder = str(pairs["llama float32"] / "packed")
    done = python(opening(), folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in done.stderr


def test_torch_loads_nothing_else_of_ours_and_nothing_that_is_not_pythons() -> None:
    program = (
        "import sys, torch\n"
        "print(*sorted(name for name in sys.modules if name.startswith('sparseserve')))\n"
        "print('transformers' in sys.modules)"
    )
    ours, transformers = python(program).stdout.splitlines()
    assert ours.split() == [
        "sparseserve",
        "sparseserve.huggingface",
        "sparseserve.huggingface.autoload",
    ]
    assert transformers == "False"


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_a_checkpoint_of_version_1_is_read_as_the_release_that_wrote_it_did() -> None:
    model = AutoModelForCausalLM.from_pretrained(VERSION_1, dtype="auto")
    tensors = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert digest(tensors) == (VERSION_1.parent / "packed24-version-1.sha256").read_text().strip()


def damaged(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("part", ["weight", "weight_indices"])
def test_a_packed_module_that_is_not_whole_stops_the_program(
    pairs: Pairs, tmp_path: Path, part: str
) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    source = pairs["llama float32"] / "packed"
    folder = damaged(source, tmp_path / "damaged", lambda tensors: tensors.pop(name))
    with pytest.raises((RuntimeError, ArtifactError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_indices_that_do_not_ascend_stop_the_program(pairs: Pairs, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight_indices"
    source = pairs["llama float32"] / "packed"
    folder = damaged(source, tmp_path / "damaged", lambda tensors: tensors[name].zero_())
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_lora_of_peft_attaches_to_a_packed_model_and_is_merged_into_it(
    pairs: Pairs, tmp_path: Path
) -> None:
    ids = torch.arange(10, 42)[None]
    outputs = []
    for form in ("packed", "dense"):
        model = AutoModelForCausalLM.from_pretrained(pairs["llama float32"] / form)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        adapted.save_pretrained(str(tmp_path / form))
        plain = AutoModelForCausalLM.from_pretrained(pairs["llama float32"] / form)
        merged = PeftModel.from_pretrained(plain, tmp_path / form).merge_and_unload()
        with torch.no_grad():
            outputs += [adapted(ids).logits, merged(ids).logits]
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=0)
    torch.testing.assert_close(outputs[1], outputs[3], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_lm_eval_measures_our_perplexity(pairs: Pairs, tmp_path: Path) -> None:
    from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate

    folder = pairs["llama float32"] / "packed"
    words = " ".join(f"{i * i % 97} quick brown foxes" for i in range(9))[:128]
    text = tmp_path / "text.txt"
    text.write_text(words)
    ours = evaluate(str(folder), EvaluationSpec(text=str(text), samples=1, sequence_length=128))
    assert ours.tokens == len(words) - 1
    document = {"first": words[0], "rest": words[1:]}
    (tmp_path / "documents.json").write_text(json.dumps([document]))
    (tmp_path / "own.yaml").write_text(
        "task: own\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'documents.json'}}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood\n"
        "doc_to_text: '{{first}}'\n"
        "doc_to_target: '{{rest}}'\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc}]\n"
    )
    program = (
        "import sys, lm_eval\n"
        "from lm_eval.tasks import TaskManager\n"
        "tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)\n"
        "arguments = f'pretrained={sys.argv[1]},dtype=float32,device=cpu,add_bos_token=False'\n"
        "found = lm_eval.simple_evaluate(\n"
        "    'hf', model_args=arguments, tasks=['own'], task_manager=tasks, bootstrap_iters=0)\n"
        "print(found['samples']['own'][0]['filtered_resps'][0][0])\n"
    )
    done = python(program, str(folder), str(tmp_path), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    likelihood = float(done.stdout.splitlines()[-1])
    assert math.exp(-likelihood / ours.tokens) == pytest.approx(ours.perplexity, rel=1e-3)
