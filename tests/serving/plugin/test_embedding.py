"""Embeddings and output heads, made and loaded by vLLM's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseserve.serving.kernels.cpu.layout import dense_panel_rows, dense_panels
from sparseserve.serving.kernels.cpu.library import missing_library

pytest.importorskip("vllm")
needs_kernels = pytest.mark.skipif(missing_library() is not None, reason=str(missing_library()))

VOCABULARY, WIDTH = 100, 36
PADDED = 128


@pytest.fixture(autouse=True)
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSESERVE_KERNELS", raising=False)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "vllm.model_executor.layers.vocab_parallel_embedding"
    monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: 1)


def random_weight(stored: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCABULARY, WIDTH, generator=generator).to(stored)


def embedding(weight: Tensor, dtype: torch.dtype = torch.float32, *, head: bool = False) -> Any:
    """Return what vLLM loads ``weight`` into to compute in ``dtype``."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from sparseserve.serving.plugin.config import SparseServeConfig

    kind = ParallelLMHead if head else VocabParallelEmbedding
    layer = kind(VOCABULARY, WIDTH, params_dtype=dtype, quant_config=SparseServeConfig())
    layer.weight_loader(layer.weight, weight)
    return layer


def finished(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def kept_bytes(layer: Any) -> int:
    from sparseserve.serving.measure.memory import prepacked_bytes, tensor_bytes

    return tensor_bytes(layer) + prepacked_bytes(layer)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [2, 36, 64])
def test_any_row_can_be_read_back_from_dense_panels(stored: torch.dtype, columns: int) -> None:
    weight = torch.randn(70, columns).to(stored)
    rows = torch.tensor([69, 0, 31, 32, 32])
    found = dense_panel_rows(dense_panels(weight, stored), rows, columns)
    assert torch.equal(found, weight[rows])


@needs_kernels
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_are_kept_once_and_serve_look_up_and_product(
    stored: torch.dtype,
) -> None:
    weight = random_weight(stored)
    layer = finished(embedding(weight))
    one_value = layer.weight.element_size()
    assert kept_bytes(layer) <= 2 * PADDED * 64 + one_value  # columns end at a multiple of 32
    assert layer.weight.dtype == torch.float32
    assert layer.weight.shape == (PADDED, WIDTH)  # a draft model compares it with its own
    ids = torch.tensor([[0, 99, 7], [32, 31, 99]])
    assert torch.equal(layer(ids), weight.float()[ids])
    inputs = torch.randn(3, WIDTH)
    logits = layer.quant_method.apply(layer, inputs)
    torch.testing.assert_close(logits[:, :VOCABULARY], inputs @ weight.float().T)
    assert torch.equal(logits[:, VOCABULARY:], torch.zeros(3, PADDED - VOCABULARY))


@needs_kernels
@pytest.mark.usefixtures("one_rank")
def test_look_up_and_product_have_the_dtype_computed_in() -> None:
    weight = random_weight(torch.bfloat16)
    layer = finished(embedding(weight, torch.bfloat16))
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    inputs = torch.randn(3, WIDTH).to(torch.bfloat16)
    logits = layer.quant_method.apply(layer, inputs)
    wanted = (inputs.double() @ weight.double().T).to(torch.bfloat16)
    torch.testing.assert_close(logits[:, :VOCABULARY], wanted)


@pytest.mark.usefixtures("one_rank")
def test_float32_values_are_left_to_vllm() -> None:
    weight = random_weight(torch.float32)
    layer = finished(embedding(weight))
    assert torch.equal(layer.weight[:VOCABULARY], weight)
    assert torch.equal(layer(torch.tensor([5])), weight[5:6])
    inputs = torch.randn(2, WIDTH)
    logits = layer.quant_method.apply(layer, inputs)
    torch.testing.assert_close(logits[:, :VOCABULARY], inputs @ weight.T)


@pytest.mark.usefixtures("one_rank")
def test_the_kernel_can_be_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESERVE_KERNELS", "dense")
    layer = finished(embedding(random_weight(torch.bfloat16)))
    assert layer.weight.shape == (PADDED, WIDTH)


@pytest.mark.usefixtures("one_rank")
def test_a_tied_output_head_is_the_embedding_itself() -> None:
    weight = random_weight(torch.bfloat16)
    layer = embedding(weight)
    assert embedding(weight, head=True).tie_weights(layer) is layer
    assert layer.bias is None


@pytest.mark.usefixtures("one_rank")
def test_a_tied_output_head_with_a_bias_or_on_another_device_stays_its_own_module() -> None:
    weight = random_weight(torch.bfloat16)
    layer, biased = embedding(weight), embedding(weight, head=True)
    biased.bias = torch.nn.Parameter(torch.zeros(PADDED))
    assert biased.tie_weights(layer) is biased
    assert biased.weight is layer.weight
    head = embedding(weight, head=True)
    assert head.tie_weights(layer.to("meta")) is head


@needs_kernels
@pytest.mark.usefixtures("one_rank")
def test_an_output_head_of_its_own_adds_its_bias() -> None:
    weight, bias = random_weight(torch.bfloat16), torch.randn(PADDED)
    layer = finished(embedding(weight, head=True))
    inputs = torch.randn(1, WIDTH)
    logits = layer.quant_method.apply(layer, inputs, bias=bias)
    expected = inputs @ weight.float().T + bias[:VOCABULARY]
    torch.testing.assert_close(logits[:, :VOCABULARY], expected)
