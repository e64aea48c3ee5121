"""No Python of a model's folder is run, whatever opens the folder and whatever stdin says."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseserve.errors import UnsupportedModelError
from sparseserve.huggingface.opening import open_config, open_tokenizer, open_weights
from sparseserve.testing import save_tiny_model

ROOT = Path(__file__).resolve().parents[3]


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A model whose folder holds code that leaves a mark when it is run."""
    folder = save_tiny_model("llama", tmp_path / "model")
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\nT = C = M = 1\n"
    )
    return folder


def with_own_config(folder: Path) -> None:
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C"})


def with_own_tokenizer(folder: Path) -> None:
    own = {"AutoTokenizer": ["own.T", None]}
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="T")


COMMANDS = {
    "serve": ["serve", "{}", "--dry-run"],
    "evaluate": ["evaluate", "{}", "--samples", "1", "--sequence-length", "16"],
    "bench": ["bench", "{}", "--baseline", "{}", "--samples", "1"],
    "tune": ["tune", "{}", "--quantization", "sparseserve"],
    "prune-and-export": ["prune-and-export", "{}", "-o", "{}-out", "--samples", "2"],
}


CASES = [
    ("prune-and-export", with_own_config, True),
    ("prune-and-export", with_own_tokenizer, False),
    ("evaluate", with_own_config, False),
    ("evaluate", with_own_tokenizer, False),
    ("bench", with_own_config, False),
    ("bench", with_own_tokenizer, False),
    # Only vLLM opens the tokenizer for these, and does so without trust.
    ("serve", with_own_config, True),
    ("tune", with_own_config, False),
]


@pytest.mark.parametrize(
    ("command", "own"),
    [
        pytest.param(command, own, marks=[] if first else pytest.mark.further)
        for command, own, first in CASES
    ],
)
def test_a_model_with_code_of_its_own_is_refused_in_one_line_and_nothing_is_asked(
    trap: Path, command: str, own: Callable[[Path], None]
) -> None:
    if command in ("serve", "bench", "tune"):
        pytest.importorskip("vllm")
    own(trap)
    arguments = [part.format(trap) for part in COMMANDS[command]]
    done = subprocess.run(
        [sys.executable, "-m", "sparseserve", *arguments],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "code of its own, which is never run" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "Error:" in line]) == 1
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (trap.parent / "mark").exists()


def test_a_model_that_transformers_knows_is_opened_by_transformers_code_alone(trap: Path) -> None:
    change(trap / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    change(trap / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.T"]})
    assert open_config(trap).model_type == "llama"
    assert type(open_weights(trap).model).__name__ == "LlamaForCausalLM"
    open_tokenizer(trap)
    assert not (trap.parent / "mark").exists()


def test_a_config_that_is_not_understood_is_one_line(trap: Path) -> None:
    change(trap / "config.json", hidden_size="wide")
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not understood") as found:
        open_config(trap)
    assert len(str(found.value).splitlines()) == 1


def test_nothing_else_calls_from_pretrained() -> None:
    callers = {
        str(path.relative_to(ROOT))
        for folder in ("sparseserve", "exporters", "serving")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    }
    assert callers == {"sparseserve/huggingface/opening.py"}
