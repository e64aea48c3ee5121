"""The logits after the last layer are those of the model, and of the hidden states alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from sparseserve.huggingface.experts import unstacked_experts
from sparseserve.models.prediction import prediction_head
from sparseserve.models.structure import trace_structure
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.models.chains import Block, Chain
from tests.unit.models.layer_runs import CPU, seen_in_the_model, windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_it_predicts_what_the_model_does(family: str, dtype: torch.dtype) -> None:
    model, (first, second) = tiny_model(family).to(dtype), windows(2)
    structure = trace_structure(model, first)
    head = prediction_head(model, structure, first[:8], CPU)
    assert head is not None
    last = structure.layers[-1].name
    hidden = seen_in_the_model(model, [last], second)[last][1].reshape(1, len(second), -1)
    with torch.no_grad():
        expected = model(second[None], use_cache=False).logits
        found = head(hidden.float())
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=tolerance)


def test_some_of_the_tokens_are_predicted_as_they_are_among_all() -> None:
    model, window = tiny_model("gemma2"), windows(1)[0]
    head = prediction_head(model, trace_structure(model, window), window[:8], CPU)
    assert head is not None
    hidden = torch.randn(1, 12, 64, requires_grad=True)
    chosen = head(hidden[:, 3::4])
    torch.testing.assert_close(chosen, head(hidden)[:, 3::4])
    (gradient,) = torch.autograd.grad(chosen.sum(), hidden)
    assert gradient[:, 3::4].any()
    assert not gradient[:, :3].any()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_model_is_left_as_it_was_and_its_layers_are_not_copied(family: str) -> None:
    model, window = tiny_model(family), windows(1)[0]
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    head = prediction_head(model, trace_structure(model, window), window[:8], CPU)
    assert head is not None
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert head._model.get_output_embeddings().weight is model.get_output_embeddings().weight
    assert not any(
        isinstance(module, type(_first_layer(model))) for module in head._model.modules()
    )


def test_a_model_that_looks_at_its_tokens_again_after_the_layers_has_none() -> None:
    model, window = tiny_model("llama"), windows(1)[0]
    tokens: list[Tensor] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"]), with_kwargs=True
    )
    model.model.norm.register_forward_hook(lambda *call: call[-1] + tokens[-1][..., None])
    assert prediction_head(model, trace_structure(model, window), window[:8], CPU) is None


def test_a_model_of_another_make_has_none() -> None:
    chain, window = Chain(Block(), Block()), windows(1)[0]
    assert prediction_head(chain, trace_structure(chain, window), window, CPU) is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "llama4_text"])
def test_a_head_that_travels_predicts_the_same_and_takes_no_layers_along(family: str) -> None:
    model, window = tiny_model(family), windows(1)[0]
    with unstacked_experts(model):
        structure = trace_structure(model, window)
        head = prediction_head(model, structure, window[:8], CPU)
        assert head is not None
        data = pickle.dumps(head)
        hidden = torch.randn(1, 12, 64)
        assert torch.equal(pickle.loads(data).to(CPU)(hidden), head(hidden))
    layers = model.get_submodule(structure.layers[0].name.rpartition(".")[0])
    rest = sum(tensor.nbytes for tensor in model.parameters())
    rest -= sum(tensor.nbytes for tensor in layers.parameters())
    assert len(data) < rest + 50_000


def _first_layer(model: nn.Module) -> nn.Module:
    return model.get_submodule(trace_structure(model, windows(1)[0]).layers[0].name)
