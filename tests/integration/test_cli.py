"""The command line as scripts see it: exit codes, one-line errors, only JSON on standard output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparseserve.machine import this_machine
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.serving.launch import requirements
from sparseserve.serving.measure.tuner import TuningReport
from sparseserve.text.calibration import DEFAULT_SEQUENCE_LENGTH
from tests.integration.command_line import Cli, prune_arguments


def test_prune_verify_evaluate_inspect_and_export_with_json(
    cli: Cli, tmp_path: Path, llama: Path, text: Path
) -> None:
    pruned = cli(*prune_arguments(llama, text, "-o", "out", "--json"))
    assert pruned.returncode == 0, pruned.stderr
    report = json.loads(pruned.stdout)
    assert report["format"] == "packed24"
    assert report["recipe"]["method"]["name"] == "admm"
    assert "model.layers.0" in pruned.stderr

    assert json.loads(cli("verify", "out", "--json").stdout)["ok"] is True

    other = tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    evaluated = cli("evaluate", "out", "--text", other, "--sequence-length", 32, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    figures = json.loads(evaluated.stdout)
    assert figures["perplexity"] > 1
    assert figures["tokens"] == figures["windows"] * 31

    inspected = json.loads(cli("inspect", "out", "--json").stdout)
    assert sum(matrix["two_four"] for matrix in inspected["matrices"]) == 14

    listed = cli("inspect", "out").stdout
    assert "14 operators pruned to 2:4" in listed
    assert re.search(r"model\.layers\.1\.mlp\.down_proj .* 2:4", listed)

    exported = cli("export", "out", "-o", "dense", "--format", "dense", "--json")
    assert json.loads(exported.stdout)["format"] == "dense"
    assert cli("verify", "dense").returncode == 0


@pytest.mark.parametrize(
    ("method", "correction"),
    [
        ("magnitude", "sequential"),
        ("wanda", "sequential"),
        ("sparsegpt", "sequential"),
        ("admm", "sequential"),
        ("fista", "intra"),
    ],
)
def test_a_method_alone_runs_as_it_was_published(
    cli: Cli, llama: Path, text: Path, method: str, correction: str
) -> None:
    done = cli(*prune_arguments(llama, text, "-o", "out", "--method", method, "--json"))
    manifest = json.loads(done.stdout)
    recipe, report = manifest["recipe"], manifest["report"]
    assert recipe["method"]["name"] == method
    assert recipe["error_correction"] == correction
    assert recipe["calibration"]["scrambled"] == 0
    assert {layer["reconstruction"] for layer in report["layers"]} == {None}
    assert report["retraining"] is None


@pytest.mark.parametrize(
    ("options", "trained", "copies"),
    [
        ("", True, 1),
        ("--recipe untrained", False, 0),
        ("--reconstruct 0", False, 1),
        ("--scrambled 0", True, 0),
        ("--recipe default --method wanda", True, 1),
        ("--method wanda --reconstruct 1", True, 0),
        ("--method wanda --scrambled 2", False, 2),
    ],
)
def test_only_recipes_and_options_train(
    cli: Cli, llama: Path, text: Path, options: str, *, trained: bool, copies: int
) -> None:
    manifest = json.loads(
        cli(*prune_arguments(llama, text, "-o", "out", "--json", *options.split())).stdout
    )
    layers = manifest["report"]["layers"]
    assert {layer["reconstruction"] is not None for layer in layers} == {trained}
    assert manifest["recipe"]["calibration"]["scrambled"] == copies


def test_a_recipe_and_a_method_are_all_of_the_recipe_with_that_solver(
    cli: Cli, tmp_path: Path, llama: Path, text: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'error_correction = "none"\n[reconstruction]\nepochs = 1\n[retraining]\nepochs = 1\n'
    )
    manifests = [
        json.loads(cli(*prune_arguments(llama, text, "--json", "--recipe", recipe, *more)).stdout)
        for more in (("-o", "own"), ("-o", "other", "--method", "wanda"))
    ]
    own, other = (dict(manifest["recipe"]) for manifest in manifests)
    assert (own.pop("method")["name"], other.pop("method")) == ("admm", {"name": "wanda"})
    assert own == other
    for manifest in manifests:
        assert manifest["report"]["retraining"] is not None


def test_distillation_trains_all_kept_weights_on_windows_that_pruning_does_not_see(
    cli: Cli, llama: Path, text: Path
) -> None:
    arguments = prune_arguments(llama, text, "--recipe", "fast", "--json")
    plain = json.loads(cli(*arguments, "-o", "plain").stdout)
    done = cli(*arguments, "-o", "out", "--distill", "4")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    report = manifest["report"]["retraining"]
    assert report["steps"] == 3  # one of the four windows is held out
    # The windows that layers are pruned with are the same.
    assert manifest["calibration"]["digest"] == plain["calibration"]["digest"]
    assert manifest["calibration"]["fresh_digest"]
    pruned = [
        operator["shape"][0] * operator["shape"][1]
        for layer in manifest["report"]["layers"]
        for operator in layer["operators"]
    ]
    assert report["trained_parameters"] > sum(pruned)
    assert cli("verify", "out").returncode == 0
    assert "1 pass over 4 windows that pruning did not see" in Path("out/README.md").read_text()
    refused = cli(*arguments, "-o", "other", "--distill", "1")
    assert refused.returncode == 1
    assert "fresh 1 must be 0, or at least 2" in refused.stderr


def test_a_recipe_keeps_its_solvers_settings_where_the_method_is_its_own(
    cli: Cli, llama: Path, text: Path
) -> None:
    arguments = prune_arguments(llama, text, "--recipe", "paper", "--json")
    alone = cli(*arguments, "-o", "alone")
    named = cli(*arguments, "-o", "named", "--method", "fista-paper")
    assert json.loads(named.stdout)["recipe"] == json.loads(alone.stdout)["recipe"]


def test_a_dry_run_writes_nothing(cli: Cli, tmp_path: Path, llama: Path, text: Path) -> None:
    before = set(tmp_path.iterdir())
    done = cli(*prune_arguments(llama, text, "--dry-run", "--ignore", "k_proj"))
    assert done.returncode == 0, done.stderr
    assert "prune  model.layers.0.self_attn.q_proj" in done.stdout
    assert "dense  model.layers.1.self_attn.k_proj" in done.stdout
    assert set(tmp_path.iterdir()) == before


def test_a_missing_output_is_wrong_usage(cli: Cli, llama: Path, text: Path) -> None:
    assert cli(*prune_arguments(llama, text)).returncode == 2


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "sparseserve", "--debug", "verify", "absent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("json_option", [["--json"], []])
def test_figures_are_shown_though_their_file_cannot_be_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json_option: list[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def removes_the_folder(checkpoint: Path, **how: Any) -> TuningReport:
        folder.rmdir()
        return TuningReport(checkpoint, (), this_machine(), {}, "today")

    monkeypatch.setattr("sparseserve.serving.measure.tuner.tune", removes_the_folder)
    monkeypatch.setattr(requirements, "require_vllm", lambda purpose: None)
    done = cli("tune", "out", "-o", folder / "found.json", *json_option)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["date"] == "today"
    assert "together" in done.stdout + done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "found.json: cannot be written (No such file or directory" in error
    assert "standard output has the same JSON" in error
    assert "go on" not in error


@pytest.mark.parametrize("command", [[], ["prune-and-export"], ["serve"], ["bench"], ["evaluate"]])
def test_every_command_has_help(cli: Cli, command: list[str]) -> None:
    done = cli(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_help_says_what_the_default_recipe_does(cli: Cli) -> None:
    recipe = PruneRecipe()
    calibration = recipe.calibration
    shown = {
        "--pattern": recipe.pattern,
        "--samples": calibration.samples,
        "--sequence-length": DEFAULT_SEQUENCE_LENGTH,
        "--seed": calibration.seed,
        "--scrambled": calibration.scrambled,
        "--error-correction": recipe.error_correction,
        "--inter-weight": recipe.inter_weight,
        "--reconstruct": recipe.reconstruction.epochs,
        "--retrain": recipe.retraining.epochs,
    }
    text = " ".join(cli("prune-and-export", "--help").stdout.split())
    for option, value in shown.items():
        start = text.index(f"{option} ")
        assert f"The recipe default: {value}. " in text[start : start + 400]


def test_help_needs_no_heavy_import() -> None:
    probe = (
        "import sys; from sparseserve.cli import main; import sparseserve;"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules);"
        "raise SystemExit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").stdout.strip().startswith("sparseserve, version ")
