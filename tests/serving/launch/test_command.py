from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sparseserve.cli.serve import serve_command
from sparseserve.errors import MissingExtraError, ServingError
from sparseserve.machine import Machine, this_machine
from sparseserve.serving.launch import command as server
from sparseserve.serving.launch import requirements
from sparseserve.serving.launch.command import (
    address,
    default_options,
    open_to_all,
    server_command,
)
from sparseserve.serving.launch.policy import GIB
from sparseserve.serving.launch.requirements import require_vllm
from sparseserve.serving.launch.served_model import ServedModel

CPU = Machine(cpu="some", cores=2, gpu=None, native_bfloat16=False, free_bytes=16 * GIB)
GPU = replace(CPU, gpu="some", native_bfloat16=True)
MODEL = ServedModel(
    folder=Path("model"),
    weight_bytes=2 * GIB,
    dense_parameters=GIB,
    cache_numbers_per_token=32 * 2**10,
    max_positions=2**17,
    vocabulary=32000,
    dtype="bfloat16",
    packed=False,
)


def options(
    machine: Machine = CPU,
    *given: str,
    model: ServedModel = MODEL,
    environment: dict[str, str] | None = None,
) -> dict[str, str]:
    flags = default_options(model, machine, given, environment or {})
    values = [*flags, ""][1:]
    return {
        flag: "" if value.startswith("-") else value
        for flag, value in zip(flags, values, strict=True)
        if flag.startswith("-")
    }


def test_a_gpu_needs_no_defaults() -> None:
    assert options(GPU) == {}


def test_an_emulated_bfloat16_is_not_used() -> None:
    assert options(CPU)["--dtype"] == "float32"
    assert "--dtype" not in options(replace(CPU, native_bfloat16=True))


def test_an_emulated_float16_is_not_used_where_only_bfloat16_is_native() -> None:
    half = replace(MODEL, dtype="float16")
    bfloat16 = replace(CPU, native_bfloat16=True)
    assert options(bfloat16, model=half)["--dtype"] == "float32"
    assert "--dtype" not in options(replace(bfloat16, native_float16=True), model=half)


@pytest.mark.parametrize(
    "given",
    [
        ("--optimization-level", "3"),
        ("--optimization_level=3",),
        ("--compilation-config.mode", "3"),
        ("--compilation-config.mode=3",),
        ("-cc.mode=3",),
        ("-O3",),
    ],
)
def test_whoever_asks_for_compilation_gets_it(given: tuple[str, ...]) -> None:
    assert "--enforce-eager" in options(CPU)
    assert "--enforce-eager" not in options(CPU, *given)


def test_a_share_of_memory_that_the_user_gave_sizes_the_cache() -> None:
    assert "--kv-cache-memory-bytes" not in options(CPU, "--gpu-memory-utilization", "0.3")


@pytest.mark.parametrize(
    ("given", "ranks", "copies"),
    [
        (("-tp", "2"), 2, 1),
        (("--tensor-parallel-size=2",), 2, 1),
        (("--data-parallel-size", "2"), 2, 2),
        (("-tp", "2", "-dp", "2"), 4, 2),
    ],
)
def test_all_ranks_together_fit_into_the_free_memory(
    given: tuple[str, ...], ranks: int, copies: int
) -> None:
    model = replace(MODEL, max_positions=None)  # its cache is limited by memory alone
    machine = replace(CPU, free_bytes=24 * GIB)
    cache = int(options(machine, *given, model=model)["--kv-cache-memory-bytes"])
    assert 0 < ranks * cache < machine.free_bytes - copies * 4 * MODEL.dense_parameters


def test_two_ranks_that_share_the_heads_hold_sequences_as_long_as_one_would() -> None:
    machine = replace(CPU, free_bytes=12 * GIB)
    long, half = replace(MODEL, max_positions=10**9), ("--dtype", "bfloat16")
    two = options(machine, *half, "-tp", "2", model=long)["--max-model-len"]
    # Half of the memory for each, and half of every token: what is left beside a second process.
    alone = replace(machine, free_bytes=machine.free_bytes - 2 * GIB)
    assert two == options(alone, *half, model=long)["--max-model-len"]


def test_float_is_another_name_of_float32() -> None:
    assert options(CPU, "--dtype", "float") == options(CPU, "--dtype", "float32")
    assert options(CPU, "--dtype=float") != options(CPU, "--dtype", "half")


def test_the_cache_and_the_weights_fit_into_the_free_memory() -> None:
    found = options(CPU)
    cache = int(found["--kv-cache-memory-bytes"])
    assert 0 < cache < CPU.free_bytes - 4 * MODEL.dense_parameters
    tokens = cache // (4 * MODEL.cache_numbers_per_token)
    assert 2 * int(found["--max-model-len"]) <= tokens


def test_a_sequence_that_fits_is_not_cut() -> None:
    assert "--max-model-len" not in options(CPU, model=replace(MODEL, max_positions=2048))
    assert "--max-model-len" not in options(CPU, model=replace(MODEL, max_positions=None))


def test_two_byte_weights_leave_more_room_than_four_byte_ones() -> None:
    # 6 GiB are free: 4-byte weights leave too little of it for the largest cache.
    small = replace(CPU, free_bytes=8 * GIB)
    caches = [
        int(options(small, *given)["--kv-cache-memory-bytes"])
        for given in ((), ("--dtype", "bfloat16"), ("--dtype=bfloat16",))
    ]
    assert caches[0] < caches[1] == caches[2]


def test_weights_that_do_not_fit_are_refused_with_both_figures() -> None:
    with pytest.raises(ServingError, match=r"needs 7\.0 GiB .* 6\.0 GiB are free"):
        options(replace(CPU, free_bytes=6 * GIB))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (("--dtype", "bfloat16"), "--dtype"),
        (("--dtype=half",), "--dtype"),
        (("--max-model-len", "64"), "--max-model-len"),
        (("--max_model_len=64",), "--max-model-len"),
        (("--kv_cache_memory_bytes", "1000000"), "--kv-cache-memory-bytes"),
        (("--no-enforce-eager",), "--enforce-eager"),
        (("-cc.mode=0",), "--enforce-eager"),
        (("-O3",), "--enforce-eager"),
    ],
)
def test_what_the_user_gives_has_no_default(given: tuple[str, ...], flag: str) -> None:
    assert flag in options(CPU)
    assert flag not in options(CPU, *given)


def test_a_configuration_file_or_a_cache_in_the_environment_is_left_in_charge() -> None:
    assert options(CPU, "--config", "serve.yaml") == {}
    found = options(CPU, environment={"VLLM_CPU_KVCACHE_SPACE": "4"})
    assert set(found) == {"--dtype", "--enforce-eager"}


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
