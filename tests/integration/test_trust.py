"""What a checkpoint does not vouch for is neither read, nor run, nor given hashes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError, SparseServeError
from sparseserve.evaluation.evaluate import EvaluationSpec, evaluate
from sparseserve.models.loading import load_model
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.inspection import inspect_checkpoint
from sparseserve.workflow.run import export
from tests.integration.command_line import Cli, refusal

SPEC = EvaluationSpec(samples=1, sequence_length=32)


def export_beside(folder: Path) -> None:
    export(folder, folder.parent / "exported", "dense")


READERS: dict[str, Callable[[Path], object]] = {
    "verify": verify,
    "export": export_beside,
    "inspect": inspect_checkpoint,
    "evaluate": lambda folder: evaluate(str(folder), SPEC),
    "serve": ServedModel.open,
    "prune": load_model,
}


@pytest.fixture
def packed(prune: Any) -> Path:
    path: Path = prune("llama").path
    return path


@pytest.fixture
def dense(prune: Any) -> Path:
    path: Path = prune("llama", "dense", export_format="dense").path
    return path


def other_weights(folder: Path) -> Path:
    """Write weights that are whole, but zero, beside those of ``folder``."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "other")
    return folder / "other"


def index_to(name: str) -> Callable[[Path], list[str]]:
    def add(folder: Path) -> list[str]:
        other_weights(folder).rename(folder / name)
        weight_map = dict.fromkeys(load_file(folder / name), name)
        data = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(data))
        return ["model.safetensors.index.json", name]

    return add


def weights_named(name: str) -> Callable[[Path], list[str]]:
    def add(folder: Path) -> list[str]:
        other_weights(folder).rename(folder / name)
        return [name]

    return add


def text_named(name: str) -> Callable[[Path], list[str]]:
    def add(folder: Path) -> list[str]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
        return [name]

    return add


def linked_templates(folder: Path) -> list[str]:
    (folder / "additional_chat_templates").symlink_to(folder.parent)
    return ["additional_chat_templates"]


STRANGERS: dict[str, Callable[[Path], list[str]]] = {
    "an index of pickles": index_to("other.bin"),
    "an index of other safetensors": index_to("other.safetensors"),
    "more safetensors": weights_named("zz.safetensors"),
    "consolidated weights": weights_named("consolidated.safetensors"),
    "an adapter": weights_named("adapter_model.safetensors"),
    "the settings of an adapter": text_named("adapter_config.json"),
    "a pickle": text_named("pytorch_model.bin"),
    "another framework's weights": text_named("model.gguf"),
    "code": text_named("modeling_llama.py"),
    "settings of another loader": text_named("params.json"),
    "a template": text_named("additional_chat_templates/tool.jinja"),
    "a vocabulary": text_named("merges.txt"),
    "a link to a folder": linked_templates,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_file_that_is_not_listed_is_named_by_all_who_would_read_it(
    packed: Path, stranger: str
) -> None:
    names = STRANGERS[stranger](packed)
    for reader in READERS.keys() - {"prune"}:  # which refuses anything packed
        with pytest.raises(SparseServeError) as caught:
            READERS[reader](packed)
        assert any(name in str(caught.value) for name in names), reader
        assert "\n" not in str(caught.value)
    assert not (packed.parent / "exported").exists()


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_dense_checkpoint_is_held_to_the_same_also_for_pruning(
    dense: Path, stranger: str
) -> None:
    names = STRANGERS[stranger](dense)
    for reader, read in READERS.items():
        with pytest.raises(SparseServeError) as caught:
            read(dense)
        message = str(caught.value)
        assert any(name in message for name in names) or "index.json" in message, reader


def test_notes_and_pictures_may_lie_beside_a_checkpoint(packed: Path) -> None:
    for name in ("README.md", "chart.png", ".gitattributes"):
        (packed / name).write_text("of no model")
    for reader in READERS.keys() - {"prune"}:
        READERS[reader](packed)
    for name in ("chart.png", ".gitattributes"):
        assert not (packed.parent / "exported" / name).exists()


def damage(folder: Path, name: str) -> None:
    """Change a byte in the middle of a file, and nothing else about it."""
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0x80
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("export_format", [name for name, row in FORMATS.items() if row.storage])
def test_nothing_damaged_is_exported_whatever_file_it_is_in(
    packed: Path, export_format: str
) -> None:
    listed = json.loads((packed / MANIFEST_FILE).read_text())["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= listed.keys()
    for name in listed:
        copy = packed.parent / "copy"
        shutil.copytree(packed, copy)
        damage(copy, name)
        with pytest.raises(ArtifactError, match=rf"{name}: (sha256 differs|cannot be read)"):
            export(copy, packed.parent / "exported", export_format)
        assert not (packed.parent / "exported").exists()
        shutil.rmtree(copy)
        shutil.rmtree(packed.parent / "exported.partial", ignore_errors=True)
    verify(export(packed, packed.parent / "exported", export_format).path)


def test_a_damaged_checkpoint_is_not_pruned_again(dense: Path, prune: Any) -> None:
    prune(dense, "again")
    damage(dense, "model.safetensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256 differs"):
        prune(dense, "once-more")


def test_evaluating_and_serving_verify_when_they_are_asked_to(packed: Path) -> None:
    asked = EvaluationSpec(samples=1, sequence_length=32, verify=True)
    whole = evaluate(str(packed), asked)
    assert whole.verified
    assert whole.perplexity == evaluate(str(packed), SPEC).perplexity
    assert ServedModel.open(packed, verified=True) == ServedModel.open(packed)
    damage(packed, "model.safetensors")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        evaluate(str(packed), asked)
    with pytest.raises(SparseServeError, match="sha256 differs"):
        ServedModel.open(packed, verified=True)


def test_a_model_without_hashes_cannot_be_verified(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"has no sparseserve\.json"):
        evaluate(str(model), EvaluationSpec(samples=1, sequence_length=32, verify=True))


def test_the_commands_say_what_they_checked_and_how_to_check_more(packed: Path, cli: Cli) -> None:
    evaluation = ("evaluate", packed, "--samples", "1", "--sequence-length", "32", "--json")
    done = cli(*evaluation)
    assert "--verify also compares their hashes" in done.stderr
    assert json.loads(done.stdout)["verified"] is False
    done = cli(*evaluation, "--verify")
    assert "verified" in done.stderr
    assert json.loads(done.stdout)["verified"] is True
    damage(packed, "model.safetensors")
    done = cli(*evaluation, "--verify")
    assert "sha256 differs" in refusal(done)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl"])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_opens_a_pickle(tmp_path: Path, name: str, reader: str) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(SparseServeError):
        READERS[reader](model)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((model / name).read_bytes())
    assert (tmp_path / "exploded").exists()  # else the test could not fail


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_code_of_a_model(tmp_path: Path, reader: str, known: bool) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    (model / "own.py").write_text(f"{code}class Own: pass\n")
    auto = {name: "own.Own" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text()) | {"auto_map": auto}
        if not known and name == "config.json":
            settings["model_type"] = "own"
        (model / name).write_text(json.dumps(settings))
    try:
        READERS[reader](model)
    except SparseServeError as error:
        assert "\n" not in str(error)  # noqa: PT017  # a refusal is as right as a reading
    assert not (tmp_path / "ran").exists()
