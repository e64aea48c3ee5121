"""The command line as scripts see it: exit codes, one-line errors, only JSON on standard output."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from sparseserve.cli import main
from sparseserve.testing import save_tiny_model, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Done:
    """What a finished command left."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the ``sparseserve`` entry point in ``tmp_path``, in this process, which is quick."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sparseserve", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        output = capfd.readouterr()
        return Done(int(end.value.code or 0), output.out, output.err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Cli:
    """Run ``python -m sparseserve`` as a process of its own in ``tmp_path``."""

    def run(*arguments: object) -> Done:
        command = [sys.executable, "-P", "-m", "sparseserve", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Sentence {i} of {i * 7 % 31} words." for i in range(200)))
    return file


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "llama")


def prune_arguments(model: Path, text: Path, *more: object) -> list[object]:
    short = ["--samples", 2, "--sequence-length", 32, "--calibration", text]
    return ["prune-and-export", model, *short, *more]


def refusal(done: Done) -> str:
    """The one line of an error; progress lines may stand before it."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


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
    assert re.search(r"model\.layers\.1\.mlp\.down_proj .* yes", listed)

    exported = cli("export", "out", "-o", "dense", "--format", "dense", "--json")
    assert json.loads(exported.stdout)["format"] == "dense"
    assert cli("verify", "dense").returncode == 0


@pytest.mark.parametrize("method", ["fista", "sparsegpt", "wanda", "magnitude"])
def test_every_method_can_be_named(cli: Cli, llama: Path, text: Path, method: str) -> None:
    done = cli(*prune_arguments(llama, text, "-o", "out", "--method", method, "--json"))
    assert json.loads(done.stdout)["recipe"]["method"]["name"] == method


def test_the_paper_recipe_runs_with_its_own_method(cli: Cli, llama: Path, text: Path) -> None:
    arguments = prune_arguments(llama, text, "-o", "out", "--recipe", "paper", "--json")
    done = cli(*arguments, "--method", "fista", "--error-correction", "none")
    recipe = json.loads(done.stdout)["recipe"]
    assert recipe["method"]["name"] == "fista-paper"
    assert recipe["error_correction"] == "none"
    assert "FISTAPruner" in refusal(cli(*arguments, "--method", "wanda", "-o", "other"))


def test_a_dry_run_writes_nothing(cli: Cli, tmp_path: Path, llama: Path, text: Path) -> None:
    before = set(tmp_path.iterdir())
    done = cli(*prune_arguments(llama, text, "--dry-run", "--ignore", "k_proj"))
    assert done.returncode == 0, done.stderr
    assert "prune  model.layers.0.self_attn.q_proj" in done.stdout
    assert "dense  model.layers.1.self_attn.k_proj" in done.stdout
    assert set(tmp_path.iterdir()) == before


def test_a_missing_output_is_wrong_usage(cli: Cli, llama: Path, text: Path) -> None:
    assert cli(*prune_arguments(llama, text)).returncode == 2


class TestBadInputIsOneLineAndExitCodeOne:
    def test_no_such_model(self, cli: Cli, text: Path) -> None:
        line = refusal(cli(*prune_arguments(Path("absent/model"), text, "-o", "out")))
        assert "absent/model" in line

    def test_a_model_that_is_not_a_causal_language_model(
        self, cli: Cli, tmp_path: Path, text: Path
    ) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 264}
        config = BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        tiny_tokenizer().save_pretrained(tmp_path / "bert")
        line = refusal(cli(*prune_arguments(Path("bert"), text, "-o", "out")))
        assert "causal" in line

    def test_text_too_short_for_one_window(self, cli: Cli, tmp_path: Path, llama: Path) -> None:
        (tmp_path / "short.txt").write_text("too short")
        line = refusal(cli(*prune_arguments(llama, Path("short.txt"), "-o", "out")))
        assert "short.txt" in line
        assert "one window needs" in line

    def test_in_features_that_do_not_fit_the_pattern(
        self, cli: Cli, tmp_path: Path, text: Path
    ) -> None:
        config = tiny_model("llama").config
        config.intermediate_size = 50
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "odd")
        tiny_tokenizer().save_pretrained(tmp_path / "odd")
        line = refusal(cli(*prune_arguments(Path("odd"), text, "-o", "out")))
        assert "down_proj: in_features 50 is not a multiple of 4" in line
        assert "--ignore" in line

    def test_weights_that_are_not_finite(self, cli: Cli, llama: Path, text: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(llama)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
        model.save_pretrained(llama)
        line = refusal(cli(*prune_arguments(llama, text, "-o", "out")))
        assert "model.layers.1.mlp.up_proj.weight" in line

    def test_activations_that_are_not_finite(self, cli: Cli, llama: Path, text: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(llama)
        model.model.layers[0].mlp.up_proj.weight.data.fill_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.data.fill_(1e30)
        model.save_pretrained(llama)
        line = refusal(cli(*prune_arguments(llama, text, "-o", "out")))
        assert "model.layers.0" in line

    def test_an_output_folder_that_is_not_empty(
        self, cli: Cli, tmp_path: Path, llama: Path, text: Path
    ) -> None:
        line = refusal(cli(*prune_arguments(llama, text, "-o", tmp_path)))
        assert "not empty" in line

    def test_a_full_disk(self, cli: Cli, tmp_path: Path, llama: Path, text: Path) -> None:
        """Files may grow to 100 KB only, as on a disk that fills up."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            done = cli(*prune_arguments(llama, text, "-o", "out"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in refusal(done)
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_cut_short(self, cli: Cli, llama: Path, text: Path) -> None:
        weights = llama / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "llama" in refusal(cli(*prune_arguments(llama, text, "-o", "out")))

    def test_a_packed_folder_with_one_byte_changed(
        self, cli: Cli, tmp_path: Path, llama: Path, text: Path
    ) -> None:
        assert cli(*prune_arguments(llama, text, "-o", "out")).returncode == 0
        weights = tmp_path / "out" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 0x10
        weights.write_bytes(data)
        assert "model.safetensors" in refusal(cli("verify", "out"))

    def test_evaluating_on_the_calibration_text(self, cli: Cli, llama: Path, text: Path) -> None:
        assert cli(*prune_arguments(llama, text, "-o", "out")).returncode == 0
        line = refusal(cli("evaluate", "out", "--text", text, "--sequence-length", 32))
        assert "calibrat" in line

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("--pattern 2-4", "pattern '2-4'"),
            ("--method fsta", "did you mean 'fista'"),
            ("--recipe defalt", "did you mean 'default'"),
            ("--error-correction inter", "available: intra, intra+inter, none, sequential"),
            ("--inter-weight 1.5", "inter_weight 1.5 must be between 0 and 1"),
            ("--reconstruct -1", "epochs -1 must not be negative"),
            ("--retrain -1", "epochs must not be negative"),
            ("--samples 1 --retrain 1", "at least --samples 2"),
            ("--samples 1 --reconstruct 1", "raise --samples"),
            ("--dtype int4", "unknown dtype 'int4'"),
            ("--samples 0", "--samples 0 must be at least 1"),
            ("--sequence-length 100000", "100000"),
            ("--samples 100000", "100000"),
            ("--device tpu9", "device 'tpu9'"),
            ("--ignore (", "not a regular expression"),
        ],
    )
    def test_an_option_out_of_range(
        self, cli: Cli, llama: Path, text: Path, options: str, part: str
    ) -> None:
        assert part in refusal(cli(*prune_arguments(llama, text, "-o", "out", *options.split())))


def test_debug_shows_where_an_error_comes_from(process: Cli) -> None:
    done = process("--debug", "verify", "absent")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("command", [[], ["prune-and-export"], ["serve"], ["bench"], ["evaluate"]])
def test_every_command_has_help(cli: Cli, command: list[str]) -> None:
    done = cli(*command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_help_needs_no_heavy_import() -> None:
    probe = (
        "import sys; from sparseserve.cli import main; import sparseserve;"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules);"
        "raise SystemExit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").stdout.strip().startswith("sparseserve, version ")


def test_the_dial_prunes_within_a_budget_and_says_so(cli: Cli, llama: Path, text: Path) -> None:
    budget = ["--max-perplexity-increase", "100000%", "--method", "magnitude"]
    done = cli(*prune_arguments(llama, text, "-o", "out", *budget))
    assert done.returncode == 0, done.stderr
    assert re.search(r"pruned share +100\.0% of", done.stdout)
    assert "at most +" in done.stdout
    manifest = json.loads(Path("out/sparseserve.json").read_text())
    assert len(manifest["report"]["dial"]["sensitivities"]) == 8


def test_the_ranking_alone_is_printed_plotted_and_written(
    cli: Cli, llama: Path, text: Path
) -> None:
    done = cli(*prune_arguments(llama, text, "--sensitivity"))
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.gate_proj+up_proj" in done.stdout
    assert Path("llama-sensitivity/sensitivity.html").stat().st_size > 1_000_000
    again = cli(*prune_arguments(llama, text, "--sensitivity", "-o", "other", "--json"))
    assert json.loads(again.stdout) == json.loads(
        Path("llama-sensitivity/sensitivity.json").read_text()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-perplexity-increase", "10"], "percent sign"),
        (["--max-perplexity-increase", "much"], "is not a share"),
        (["--max-perplexity-increase=-3%"], "is not a share"),
        (["--max-perplexity-increase", "0"], "must be above 0"),
        (["--keep-dense-fraction", "100%"], "below 1"),
        (["--keep-dense-fraction", "20%", "--samples", "1000"], "give more text"),
        (["--max-perplexity-increase", "0.000001%"], "stay dense"),
        (["--keep-dense-fraction", "20%", "--validation", "./missing.txt"], "does not exist"),
    ],
)
def test_a_dial_that_cannot_be_set_is_one_line(
    cli: Cli, llama: Path, text: Path, options: list[str], message: str
) -> None:
    done = cli(*prune_arguments(llama, text, "-o", "out", *options))
    assert message in refusal(done)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--keep-dense-fraction", "20%", "--max-perplexity-increase", "10%"],
        ["--sensitivity", "--dry-run"],
        ["--validation", "text.txt"],
        ["--keep-dense-fraction", "20%"],
    ],
)
def test_dial_options_that_do_not_go_together_are_wrong_usage(
    cli: Cli, llama: Path, text: Path, options: list[str]
) -> None:
    done = cli(*prune_arguments(llama, text, *options))
    assert done.returncode == 2


def test_a_missing_plotting_package_is_named_before_any_work(
    cli: Cli, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseserve.sensitivity_plot.find_spec", lambda name: None)
    done = cli(*prune_arguments(llama, text, "--sensitivity"))
    assert "pip install 'sparseserve[plots]'" in refusal(done)
    assert "loading" not in done.stderr
