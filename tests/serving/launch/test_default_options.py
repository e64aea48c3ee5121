"""The options that serve gives vLLM by itself: for the machine, and for what its user asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sparseserve.errors import ServingError
from sparseserve.machine import Machine
from sparseserve.serving.kernels import DENSE, KERNELS
from sparseserve.serving.launch.command import default_options
from sparseserve.serving.launch.policy import GIB
from sparseserve.serving.launch.served_model import ServedModel

CPU = Machine(cpu="some", cores=2, gpu=None, native_bfloat16=False, free_bytes=16 * GIB)
GPU = replace(CPU, gpu="some", native_bfloat16=True)
MODEL = ServedModel(
    folder=Path("model"),
    weight_bytes=2 * GIB,
    dense_parameters=GIB,
    packed_parameters=0,
    cache_numbers_per_token=32 * 2**10,
    max_positions=2**17,
    vocabulary=32000,
    dtype="bfloat16",
)


def options(
    machine: Machine = CPU,
    *given: str,
    model: ServedModel = MODEL,
    environment: dict[str, str] | None = None,
) -> dict[str, str]:
    flags = default_options(model, machine, given, environment or {}).options
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


def test_a_model_that_fits_only_while_it_is_packed_stays_so() -> None:
    model = replace(MODEL, packed_parameters=GIB * 9 // 10)
    float32, small = ("--dtype", "float32"), replace(CPU, free_bytes=6 * GIB)
    packed = default_options(model, small, float32, {})
    assert set(packed.environment) == {"SPARSESERVE_KERNELS"}
    names = packed.environment["SPARSESERVE_KERNELS"].split(",")
    assert {"cpu_direct", "cpu_dense"} <= set(names) <= set(KERNELS) - {DENSE}
    assert int(packed.options[packed.options.index("--kv-cache-memory-bytes") + 1]) < GIB
    assert not default_options(model, CPU, float32, {}).environment
    own = {"SPARSESERVE_KERNELS": "cpu_direct"}
    assert not default_options(model, small, float32, own).environment
    with pytest.raises(ServingError, match=r"needs 5\.0 GiB .* 4\.0 GiB are free"):
        default_options(model, replace(small, free_bytes=4 * GIB), float32, {})


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
