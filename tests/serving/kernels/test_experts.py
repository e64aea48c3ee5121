"""Products of experts, each with tokens of its own, against one product after the other."""

from __future__ import annotations

from itertools import product as pairs_of

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseserve.errors import ServingError
from sparseserve.serving.kernels.choice.choose import TimedLayers
from sparseserve.serving.kernels.cpu.bf16_kernels import CpuBf16, CpuBf16Tiles
from sparseserve.serving.kernels.cpu.experts import ExpertWeights, pack_experts
from sparseserve.serving.kernels.cpu.library import Bf16Unit, missing_library, native_library
from sparseserve.serving.kernels.cpu.token_groups import RoutedTokens, TokenGroup
from sparseserve.sparsity import TWO_FOUR

pytestmark = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))

BF16 = torch.bfloat16


def units(kind: type[CpuBf16]) -> list[Bf16Unit]:
    """Return the vector units of this processor that run a kernel."""
    own = () if missing_library() else native_library().bf16_units
    tiles = kind is not CpuBf16Tiles or not native_library().tiles
    return [unit for unit in own if unit is Bf16Unit.PORTABLE or tiles]


each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kind(unit), id=f"{kind.__name__}-{unit.name}")
        for kind, unit in pairs_of((CpuBf16, CpuBf16Tiles), Bf16Unit)
        if unit in units(kind)
    ],
)


def experts(
    count: int, rows: int, columns: int, *, dtype: torch.dtype = BF16, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weights = TWO_FOUR.project(torch.randn(count * rows, columns, generator=generator))
    return weights.view(count, rows, columns).to(dtype)


def packed(weights: Tensor) -> ExpertWeights:
    return pack_experts("experts", weights, lambda _: None)


def consecutive(sizes: list[int], weights: list[int]) -> list[TokenGroup]:
    firsts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [TokenGroup(*group) for group in zip(weights, firsts, sizes, strict=True)]


@pytest.mark.usefixtures("kernels_without_timing")
@each_kernel
@pytest.mark.parametrize(
    "sizes",
    [[1], [1] * 8, [3, 0, 5, 1], [100, 7, 200, 30, 250, 1], [600, 1], [0, 0]],
    ids=["one token", "eight experts", "few", "many", "one expert", "none"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_each_group_of_tokens_has_the_product_by_its_own_weight(
    *, kernel: CpuBf16, sizes: list[int], biased: bool
) -> None:
    weights = experts(5, 72, 132)
    panels = packed(weights).parts[0].panels
    inputs = torch.randn(sum(sizes), 132).to(BF16)
    groups = consecutive(sizes, [(3 * number + 1) % 5 for number in range(len(sizes))])
    bias = torch.randn(5, 72).to(BF16) if biased else None
    found = torch.full((len(inputs), 72), torch.nan, dtype=BF16)
    kernel.matmul_groups(panels, inputs, groups, bias, found)
    for weight, first, tokens in groups:
        own = slice(first, first + tokens)
        one = None if bias is None else bias[weight]
        wanted = inputs[own].double() @ weights[weight].double().T
        wanted += 0 if one is None else one.double()
        torch.testing.assert_close(found[own].double(), wanted, rtol=1e-2, atol=2e-2)
        if not isinstance(kernel, CpuBf16Tiles):  # which adds up a lone tile in another order
            alone = kernel.matmul((panels[weight],), inputs[own], one, 72)
            assert torch.equal(found[own], alone)


@each_kernel
def test_the_number_of_threads_changes_no_bit_of_grouped_products(kernel: CpuBf16) -> None:
    panels = packed(experts(4, 100, 1028)).parts[0].panels
    groups = consecutive([9, 1, 40, 130], [2, 0, 3, 1])
    inputs, threads, found = torch.randn(180, 1028).to(BF16), torch.get_num_threads(), []
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            found.append(torch.empty(180, 100, dtype=BF16))
            kernel.matmul_groups(panels, inputs, groups, None, found[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "group",
    [(2, 0, 1), (-1, 0, 1), (0, 3, 2), (0, -1, 1), (0, 0, -1)],
    ids=["weight", "negative weight", "beyond", "before", "negative"],
)
def test_groups_that_leave_weights_or_tokens_never_reach_native_code(
    group: tuple[int, int, int],
) -> None:
    panels, inputs = packed(experts(2, 32, 32)).parts[0].panels, torch.ones(4, 32, dtype=BF16)
    with pytest.raises(ValueError, match=r"TokenGroup.* of 2 weights and 4 tokens"):
        CpuBf16(Bf16Unit.PORTABLE).matmul_groups(
            panels, inputs, [TokenGroup(*group)], None, torch.empty(4, 32, dtype=BF16)
        )


def test_operands_of_groups_that_do_not_fit_never_reach_native_code() -> None:
    panels, inputs = packed(experts(2, 32, 32)).parts[0].panels, torch.ones(4, 32, dtype=BF16)
    good = torch.empty(4, 32, dtype=BF16)
    kernel, groups = CpuBf16(Bf16Unit.PORTABLE), [TokenGroup(0, 0, 4)]
    for product in (good.float(), good[:3], torch.empty(32, 4, dtype=BF16).T, good[:, :1]):
        with pytest.raises(ValueError, match=r"product|rows"):
            kernel.matmul_groups(panels, inputs, groups, None, product)
    with pytest.raises(ValueError, match="bias of shape"):
        kernel.matmul_groups(panels, inputs, groups, torch.ones(32), good)
    with pytest.raises(ValueError, match="inputs"):
        kernel.matmul_groups(panels, inputs[:, :-1].float(), groups, None, good)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 6),
    count=st.integers(6, 20),
    seed=st.integers(0, 999),
)
def test_tokens_are_sorted_by_the_experts_that_were_chosen_for_them(
    *, tokens: int, choices: int, count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, count, generator=generator).topk(choices).indices.int()
    routed = RoutedTokens.of(chosen, count)
    places = {
        place: group.weight
        for group in routed.groups
        for place in range(group.first, group.first + group.tokens)
    }
    assert sorted(places) == list(range(tokens * choices))
    for token in range(tokens):
        for choice in range(choices):
            place = int(routed.places[token, choice])
            assert routed.rows[place] == token
            assert places[place] == chosen[token, choice]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("kernels", ["cpu_unpacked", "cpu_direct,cpu_unpacked", ""])
def test_experts_are_multiplied_in_every_dtype_by_whatever_kernels_are_allowed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernels: str
) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", kernels)
    weights = experts(4, 40, 100, dtype=dtype)
    sizes, inputs = [1, 20, 3], torch.randn(24, 100).to(dtype)
    bias = torch.randn(4, 40).to(dtype)
    groups = consecutive(sizes, [3, 0, 2])
    found = packed(weights).matmul(inputs, groups, bias)
    assert found.dtype == dtype
    for weight, first, tokens in groups:
        own = slice(first, first + tokens)
        wanted = inputs[own].double() @ weights[weight].double().T + bias[weight].double()
        error = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found[own].double(), wanted, rtol=error, atol=error)


@pytest.mark.usefixtures("kernels_without_timing")
def test_one_expert_of_more_bits_widens_the_panels_of_all() -> None:
    weights = experts(3, 32, 64).float()
    weights[2] *= 1.0001
    found = packed(weights)
    assert found.parts[0].panels.dtype == torch.float32
    inputs = torch.eye(64)
    for number in range(3):
        product = found.matmul(inputs, [TokenGroup(number, 0, 64)], None)
        assert torch.equal(product.T, weights[number])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kernels", ["cpu_unpacked,cpu_dense", ""])
def test_experts_that_are_not_two_four_are_multiplied_beside_the_others(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernels: str
) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", kernels)
    weights = experts(5, 32, 128).to(dtype)
    weights[1], weights[3] = torch.randn(2, 32, 128).to(dtype)
    found = packed(weights)
    assert [part.experts for part in found.parts] == [(0, 2, 4), (1, 3)]
    assert found.experts == 5
    inputs, bias = torch.randn(60, 128).to(dtype), torch.randn(5, 32).to(dtype)
    groups = consecutive([7, 1, 30, 20, 2], [1, 4, 0, 3, 2])
    product = found.matmul(inputs, groups, bias)
    for weight, first, tokens in groups:
        own = slice(first, first + tokens)
        wanted = inputs[own].double() @ weights[weight].double().T + bias[weight].double()
        error = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(product[own].double(), wanted, rtol=error, atol=3 * error)


def test_experts_of_which_none_is_two_four_are_refused() -> None:
    with pytest.raises(ServingError, match="none of them is 2:4"):
        packed(torch.ones(3, 8, 8))
    with pytest.raises(ServingError, match="none of them is 2:4"):
        packed(experts(3, 8, 8)[:, :, :7])


def test_where_no_kernel_may_run_experts_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", "dense,cpu_dense")
    with pytest.raises(ServingError, match="SPARSESERVE_KERNELS leaves no kernel for them"):
        packed(experts(2, 8, 8))
    monkeypatch.setenv("SPARSESERVE_KERNELS", "cpu_bf16")
    with pytest.raises(ServingError, match="cpu_bf16: multiplies bfloat16, not float32"):
        packed(experts(2, 8, 8).float())


def test_experts_of_one_shape_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", "cpu_direct,cpu_unpacked")
    monkeypatch.setenv("SPARSESERVE_MEASURE", "1")
    told: list[str] = []
    timed = TimedLayers()
    for seed in range(2):
        pack_experts("experts", experts(2, 32, 96, seed=seed), told.append, timed)
    assert [line for line in told if "timing" in line] == [
        "32 x 96 bfloat16 in bfloat16: timing cpu_direct, cpu_unpacked"
    ]


def test_kernels_of_experts_keep_nothing_of_the_weight_they_were_timed_with() -> None:
    assert packed(experts(2, 32, 32)).parts[0].kernels.packed == ()
