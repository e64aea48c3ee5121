"""What would stop a run at its end stops it at its beginning, and a dry run with it."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families.tiny_configurations import tiny_configuration
from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.folder_lock import locked
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.machine import this_machine
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.retraining.settings import Retraining
from sparseserve.testing import save_tiny_model, tiny_tokenizer
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan
from sparseserve.workflow.time_estimate import layer_shares
from tests.integration.command_line import Cli, prune_arguments, refusal
from tests.integration.conftest import Prune


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture
def refused(cli: Cli, text: Path, tmp_path: Path) -> Callable[..., str]:
    """Return the line that refuses the dry run and the run, which prunes nothing before it."""

    def run(model: Path, *options: object) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        arguments = prune_arguments(model, text, "-o", tmp_path / "out", *options)
        dry, real = cli(*arguments, "--dry-run"), cli(*arguments)
        assert "relative error" not in real.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert refusal(dry) == refusal(real)
        return refusal(real)

    return run


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("place", ["full", "gone"])
def test_where_temporary_files_find_no_room_another_folder_for_them_is_the_remedy(
    model: Path, quick: PruneRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    scratch = tmp_path / "scratch"
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    if place == "full":
        scratch.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ArtifactError) as caught:
            plan(Job(str(model), quick), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(scratch) in str(caught.value)
    assert str(caught.value).endswith("name another folder for temporary files with TMPDIR")
    assert not scratch.exists() or not list(scratch.iterdir())


def test_a_plan_lists_what_would_be_pruned(tmp_path: Path, quick: PruneRecipe) -> None:
    save_tiny_model("gpt2", tmp_path / "m")
    found = plan(Job(str(tmp_path / "m"), replace(quick, ignore=("c_fc",))))
    names = [name for name, _ in found.operators]
    assert names[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert found.dense_modules == ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")
    assert 0 < found.pruned_parameters < found.total_parameters


def test_the_time_of_a_run_is_told_from_its_first_layer(
    cli: Cli, tmp_path: Path, text: Path
) -> None:
    model = save_tiny_model("llama", tmp_path / "m")
    arguments = prune_arguments(model, text, "--ignore", r"layers\.0\.", "--reconstruct", "1")
    told = cli(*arguments, "--dry-run", "--estimate-time")
    assert told.stdout.splitlines()[-1].endswith("to prune the layers on this machine")
    found = json.loads(cli(*arguments, "--dry-run", "--estimate-time", "--json").stdout)
    assert found["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "text.txt"]
    assert json.loads(cli(*arguments, "--dry-run", "--json").stdout)["seconds"] is None
    alone = cli(*arguments, "-o", tmp_path / "out", "--estimate-time")
    assert "--estimate-time goes with --dry-run" in alone.stderr


@pytest.mark.parametrize(
    ("weights", "more", "shares"),
    [
        ([8, 8, 8], [], 3.0),
        ([0, 4, 8], [], 3.0),
        ([8, 8, 8], [1.0, 1.0], 5.0),
        ([8, 4], [0.5] * 4, 2.25),
    ],
)
def test_layers_cost_as_much_as_they_have_weights(
    weights: list[int], more: list[float], shares: float
) -> None:
    assert layer_shares(weights, more) == shares


def test_nothing_left_to_prune_is_an_error(prune: Prune, quick: PruneRecipe) -> None:
    with pytest.raises(RecipeError, match="nothing is left to prune"):
        prune("llama", recipe=replace(quick, ignore=(".",)))


def test_layers_that_run_more_than_once_are_refused(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_configuration("hrm_text")).save_pretrained(
        tmp_path / "hrm"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "hrm")
    assert "layers must run once each, in order" in refused(tmp_path / "hrm")


def test_a_run_that_memory_cannot_hold_is_refused_with_what_to_change(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(this_machine(), free_bytes=2**28)
    monkeypatch.setattr("sparseserve.workflow.needs.this_machine", lambda: small)
    message = refused(model)
    assert "GiB of memory, and this machine has 0.2 GiB free: --reconstruct 0" in message


def test_code_that_the_configuration_names_but_nobody_has_is_refused(
    model: Path, refused: Callable[..., str]
) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    assert "there is no modeling_own.py beside it" in refused(model)


def test_a_tokenizer_with_a_file_elsewhere_is_refused(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copyfile(model / "tokenizer.json", tmp_path / "elsewhere.json")
    edit(model / "tokenizer_config.json", tokenizer_file=str(tmp_path / "elsewhere.json"))
    assert "outside the model's folder" in refused(model)


def test_a_pattern_that_the_format_cannot_hold_is_refused(
    model: Path, refused: Callable[..., str]
) -> None:
    assert "2:4" in refused(model, "--pattern", "50%", "--format", "packed24")


@pytest.mark.parametrize("options", [["--reconstruct", 1], ["--retrain", 1]])
def test_training_with_too_few_windows_is_refused(
    model: Path, refused: Callable[..., str], options: list[object]
) -> None:
    assert "--samples" in refused(model, "--samples", 1, *options)


def test_an_output_that_is_taken_is_refused(
    model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "out: exists and is not empty" in refused(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_rehearsal_changes_nothing_of_the_result(
    prune: Prune, quick: PruneRecipe, tmp_path: Path, family: str
) -> None:
    source = save_tiny_model(family, tmp_path / family)
    before = prune(source, "before", recipe=quick)
    plan(Job(str(source), quick), tmp_path / "after")
    after = prune(source, "after", recipe=quick)
    names = ("model.safetensors", "config.json")
    assert all(
        (before.path / name).read_bytes() == (after.path / name).read_bytes() for name in names
    )


def test_a_run_that_retrains_is_rehearsed_too(model: Path, quick: PruneRecipe) -> None:
    recipe = PruneRecipe(
        pruner=quick.pruner, calibration=quick.calibration, retraining=Retraining(epochs=1)
    )
    assert len(plan(Job(str(model), recipe)).operators) == 14


SETTINGS = {
    # transformers calls this one invalid, and would not write it.
    "generation_config.json": {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    "preprocessor_config.json": {"size": 3},
    "special_tokens_map.json": {},
}


def test_files_that_are_not_changed_are_copied_byte_for_byte(
    prune: Prune, tmp_path: Path, model: Path
) -> None:
    for name, content in SETTINGS.items():
        (model / name).write_text(json.dumps(content, indent=7))
    (model / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "LICENSE.md").write_text("Yours.")
    (model / "modeling_own.py").write_text("raise SystemExit('run')")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    for export_format in ("packed24", "dense"):
        out = prune(model, export_format, export_format=export_format).path
        for path in (each for each in model.rglob("*") if each.is_file()):
            if path.name not in {"config.json", "model.safetensors"}:
                assert (out / path.relative_to(model)).read_bytes() == path.read_bytes()


# As checkpoints of older releases have them, at the top and under their old names.
ROPE = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("export_format", ["packed24", "dense"])
def test_the_configuration_keeps_every_key(prune: Prune, model: Path, export_format: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= ROPE | {"own_key": {"deep": [1, None]}, "torch_dtype": "float32"}
    (model / "config.json").write_text(json.dumps(config))
    out = prune(model, export_format=export_format).path
    written = json.loads((out / "config.json").read_text())
    assert {key: written.get(key) for key in config} == config
    assert set(written) - set(config) <= {"quantization_config"}


def interrupted(prune: Prune, model: Path, recipe: PruneRecipe) -> None:
    class Killed(Exception):
        pass

    class AfterOneLayer(PruneProgress):
        def layer_started(self, name: str, number: int, total: int) -> None:
            if number > 1:
                raise Killed

    with pytest.raises(Killed):
        prune(model, recipe=recipe, progress=AfterOneLayer())


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "generation_config.json", "model.safetensors"),
        *("README.md", "LICENSE", "modeling_own.py"),
    ],
)
def test_a_model_that_changed_since_the_interruption_is_not_mixed_in(
    prune: Prune, model: Path, quick: PruneRecipe, name: str
) -> None:
    for added in ("README.md", "LICENSE", "modeling_own.py"):
        (model / added).write_text("# text")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    interrupted(prune, model, quick)
    stat = (model / name).stat()
    change = b"\x00\x00\x80?" if name.endswith(".safetensors") else b"\n"
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[: -len(change)] + change if len(change) > 1 else data + change)
    os.utime(model / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ArtifactError, match=f"different: model file {name}"):
        prune(model, recipe=quick)


def test_files_that_decide_nothing_may_change_while_a_run_is_interrupted(
    prune: Prune, model: Path, quick: PruneRecipe, tmp_path: Path
) -> None:
    names = ("run.log", "old.safetensors.bak", "own.py")
    for name in names:
        (model / name).write_text("before")
    interrupted(prune, model, quick)
    for name in names:
        (model / name).write_text("after")
    (model / "new.log").write_text("new")
    assert prune(model, recipe=quick).path == tmp_path / "out"


def whole(prune: Prune, model: Path, recipe: PruneRecipe) -> Artifact:
    return prune(model, "whole", recipe=recipe)


@pytest.mark.parametrize("name", ["model.safetensors", "report.json"])
def test_a_stored_layer_that_was_changed_is_pruned_again(
    prune: Prune, model: Path, quick: PruneRecipe, tmp_path: Path, name: str
) -> None:
    expected = whole(prune, model, quick)
    interrupted(prune, model, quick)
    [stored] = (tmp_path / "out.partial" / "layers").rglob(name)
    data = bytearray(stored.read_bytes())
    if name == "report.json":
        stored.write_bytes(data.replace(b"0.", b"1.", 1))
    else:
        # All values zero, in a file that is otherwise whole.
        header = 8 + int.from_bytes(data[:8], "little")
        stored.write_bytes(data[:header] + bytes(len(data) - header))
    found = prune(model, recipe=quick)
    weights = "model.safetensors"
    assert (found.path / weights).read_bytes() == (expected.path / weights).read_bytes()


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--keep-dense-fraction", "10%"]])
def test_an_output_that_another_process_fills_is_refused(
    cli: Cli, model: Path, text: Path, tmp_path: Path, more: list[str]
) -> None:
    with locked(tmp_path / "out.partial"):
        done = cli(*prune_arguments(model, text, "-o", tmp_path / "out", *more))
    assert f"another process (process {os.getpid()}) is working in it" in refusal(done)
