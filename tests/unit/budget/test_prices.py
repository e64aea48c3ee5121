from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field, fields, replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseserve.budget.price_run import pricing_recipe
from sparseserve.budget.prices import UnitSensitivity, measure_sensitivities
from sparseserve.checkpoint.quantization import Quantization
from sparseserve.evaluation.perplexity import perplexity
from sparseserve.layerwise.layer import PrunedLayer
from sparseserve.models.structure import trace_structure
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.report import LayerReport
from sparseserve.retraining.settings import Retraining
from sparseserve.sparsity import TWO_FOUR
from sparseserve.testing import TINY_VOCABULARY, tiny_model

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")
# What a recipe says of more than one operator, or of weights after they are pruned.
ALONE = {"pruner", "error_correction", "reconstruction", "retraining", "quantization", "rotate"}


@dataclass
class Magnitudes:
    """A store that prunes by magnitude and keeps everything in memory."""

    model: PreTrainedModel
    measured: dict[str, tuple[UnitSensitivity, ...]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def pruned(self, layer: str) -> PrunedLayer:
        self.asked.append(layer)
        module = self.model.get_submodule(layer)
        matrices = {name: p for name, p in module.named_parameters() if p.ndim == 2}
        parameters = {
            name: weight * TWO_FOUR.best_mask(weight.abs()) for name, weight in matrices.items()
        }
        return PrunedLayer(parameters, LayerReport(layer, (), 0.0))

    def load(self, layer: str) -> tuple[UnitSensitivity, ...] | None:
        return self.measured.get(layer)

    def save(self, layer: str, units: tuple[UnitSensitivity, ...]) -> None:
        self.measured[layer] = units


def windows(count: int = 3, length: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randint(0, 256, (count, length), generator=generator))


def losses(model: PreTrainedModel, tokens: list[Tensor]) -> list[float]:
    return [math.log(perplexity(model, [window]).perplexity) for window in tokens]


def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(window[None]).logits
    return logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_price_is_that_of_the_whole_model_with_one_unit_replaced(family: str) -> None:
    model = tiny_model(family)
    store, tokens = Magnitudes(copy.deepcopy(model)), windows()
    found = measure_sensitivities(model, PruneRecipe(), tokens, store)
    dense = losses(model, tokens)
    for unit in found:
        replaced = copy.deepcopy(model)
        for name in unit.operators:
            layer = ".".join(name.split(".")[: name.split(".").index(str(unit.layer)) + 1])
            key = f"{name.removeprefix(layer + '.')}.weight"
            value = store.pruned(layer).parameters[key]
            replaced.get_submodule(layer).get_parameter(key).copy_(value)
        rises = [
            after - before for before, after in zip(dense, losses(replaced, tokens), strict=True)
        ]
        assert unit.loss_increases == pytest.approx(rises, abs=2e-6)
        for window, divergence in zip(tokens, unit.divergences, strict=True):
            own, other = (log_probabilities(m, window) for m in (model, replaced))
            exact = float((own.exp() * (own - other)).sum(-1).mean())
            # Eight of 264 tokens are taken together, which can only lower it.
            assert 0.9 * exact <= divergence <= exact + 1e-6
            assert exact > 1e-4


def test_every_operator_is_in_one_unit_with_those_that_read_its_input() -> None:
    model = tiny_model("llama")
    found = measure_sensitivities(model, PruneRecipe(), windows(), Magnitudes(model))
    groups = [
        tuple(layer.full_name(operator) for operator in group.operators)
        for layer in trace_structure(model, windows()[0][:8]).layers
        for group in layer.groups
    ]
    assert [unit.operators for unit in found] == groups
    assert found[0].label == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert (found[0].kind, found[-1].layer) == ("self_attn.q_proj+k_proj+v_proj", 1)
    sizes = [sum(model.get_submodule(name).weight.numel() for name in names) for names in groups]
    assert [unit.weights for unit in found] == sizes


def test_the_model_ends_as_it_began() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    measure_sensitivities(model, PruneRecipe(), windows(), Magnitudes(copy.deepcopy(model)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_ignored_operators_are_not_measured_and_measured_layers_not_again() -> None:
    model = tiny_model("llama")
    recipe, store = PruneRecipe(ignore=("v_proj", "mlp")), Magnitudes(model)
    found = measure_sensitivities(model, recipe, windows(), store)
    assert found[0].operators == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    assert len(found) == 4
    del store.measured["model.layers.1"]
    store.asked.clear()
    assert measure_sensitivities(model, recipe, windows(), store) == found
    assert store.asked == ["model.layers.1"]


def test_json_brings_a_unit_back() -> None:
    unit = UnitSensitivity(
        operators=("a.0.q", "a.0.k"), weights=8, loss_increases=(0.5, 0.25), divergences=(0.5,)
    )
    assert UnitSensitivity.from_json(asdict(unit)) == unit
    assert unit.loss_increase == 0.375
    assert TINY_VOCABULARY > 256  # so that the divergence lumps some tokens together


def test_agreement_between_halves_is_a_rank_correlation_of_means() -> None:
    from benchmarks.quality.budget import split_half_agreement

    units = [
        UnitSensitivity(
            operators=("a.0.q",),
            weights=1,
            loss_increases=(price, price**2, price, price**2),
            divergences=(-price, -price, 1.0, 1.0),
        )
        for price in (0.1, 0.5, 0.3, 0.2)
    ]
    assert split_half_agreement(units) == pytest.approx({"loss increase": 1, "divergence": -1})


def test_operators_are_priced_as_the_recipe_would_prune_them_but_alone_and_untrained() -> None:
    recipe = replace(
        PruneRecipe(),
        ignore=("q_proj",),
        experts="dense",
        dtype="float16",
        compute_dtype="float32",
        rotate="heads",
        quantization=Quantization(to="int4"),
        retraining=Retraining(epochs=2),
    )
    priced = pricing_recipe(recipe)
    same = {item.name for item in fields(recipe) if item.name not in ALONE}
    assert all(getattr(priced, name) == getattr(recipe, name) for name in same)
    assert not priced.reconstruction.epochs
    assert not priced.retraining.epochs
    assert not priced.quantization
    assert not priced.correction.chained
    assert priced.rotate == "none"
