"""Bad input on the command line is one line and an exit code."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from sparseserve.checkpoint.artifact import MANIFEST_FILE
from sparseserve.testing import tiny_model, tiny_tokenizer
from tests.integration.command_line import Cli, prune_arguments, refusal
from tests.integration.conftest import Prune


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

    @pytest.mark.parametrize("command", ["export", "prune-and-export"])
    def test_an_output_folder_inside_the_checkpoint_it_is_made_of(
        self, cli: Cli, prune: Prune, text: Path, command: str
    ) -> None:
        checkpoint = prune("llama", export_format="dense").path
        given: dict[str, list[object]] = {
            "export": ["export", checkpoint, "--format", "packed24"],
            "prune-and-export": prune_arguments(checkpoint, text),
        }
        line = refusal(cli(*given[command], "-o", checkpoint / "packed"))
        assert f"lies in the checkpoint {checkpoint}" in line
        assert "choose a place outside of it" in line
        assert cli("verify", checkpoint).returncode == 0

    @pytest.mark.parametrize("command", ["bench CHECKPOINT --baseline DENSE", "tune CHECKPOINT"])
    @pytest.mark.parametrize(
        ("name", "part"),
        [
            ("absent/found.json", "there is no folder absent: make it"),
            ("folder", "is a folder or no plain file"),
            ("checkpoint/found.json", "lies in the checkpoint"),
            ("f" * 252, "File name too long"),
        ],
    )
    def test_a_file_for_figures_that_could_not_be_written_after_they_are_measured(
        self, cli: Cli, tmp_path: Path, command: str, name: str, part: str
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "checkpoint").mkdir()
        (tmp_path / "checkpoint" / MANIFEST_FILE).write_text("{}")
        line = refusal(cli(*command.split(), "-o", name))
        assert name in line
        assert part in line

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

    @pytest.mark.parametrize("name", ["a" * 300, "~nosuchuser/x", "[/x]", "a\nb"])
    @pytest.mark.parametrize("kind", ["model", "text", "verify", "inspect", "export", "evaluate"])
    def test_a_name_that_nothing_has(
        self, cli: Cli, llama: Path, text: Path, name: str, kind: str
    ) -> None:
        commands: dict[str, list[object]] = {
            "model": prune_arguments(Path(name), text, "-o", "out"),
            "text": prune_arguments(llama, Path(name), "-o", "out"),
            "export": ["export", name, "-o", "out", "--format", "dense"],
        }
        assert refusal(cli(*commands.get(kind, [kind, name])))

    @pytest.mark.parametrize("name", ["o" * 250, "o" * 300, "~nosuchuser/o"])
    def test_an_output_that_no_disk_can_hold(
        self, cli: Cli, llama: Path, text: Path, name: str
    ) -> None:
        assert name[:10] in refusal(cli(*prune_arguments(llama, text, "-o", name)))

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
            ("--samples 1 --reconstruct 1", "at least --samples 2"),
            ("--dtype int4", "unknown dtype 'int4'"),
            ("--scrambled -1", "scrambled -1 must not be negative"),
            ("--samples 0", "--samples 0 must be at least 1"),
            ("--sequence-length 100000", "100000"),
            ("--samples 100000", "100000"),
            ("--device tpu9", "device 'tpu9'"),
            ("--ignore (", "not a regular expression"),
            (f"--ignore {'(' * 2000}", "(2000 characters) is not a regular expression"),
            ("--ignore dwon_proj", "matches no operator: did you mean 'down_proj'?"),
            ("--ignore k_proj --ignore re:.*v_proj", "leave 're:' out"),
            ("--ignore dwon_proj --dry-run", "matches no operator"),
            ("--seed 18446744073709551616", "--seed 18446744073709551616 must be from 0"),
            ("--scrambled 1001", "--scrambled 1001 must be at most 1000"),
            ("--inter-weight nan", "inter_weight is nan, but must be finite"),
            (f"--reconstruct 1{'0' * 30}", "epochs has 100 bits"),
            (f"--pattern {'1' * 5000}:4", "is not N:M"),
            ("--device mps", "device 'mps' is not supported"),
            ("--device cpu:9", "device 'cpu:9'"),
            ("--text-column text", "is plain text without columns: leave --text-column text out"),
            (f"--recipe {'r' * 300}", "cannot be looked up: File name too long"),
        ],
    )
    def test_an_option_out_of_range(
        self, cli: Cli, llama: Path, text: Path, options: str, part: str
    ) -> None:
        assert part in refusal(cli(*prune_arguments(llama, text, "-o", "out", *options.split())))
