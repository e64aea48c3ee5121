"""Retraining after pruning: what it may change, what it computes, and that it only ever helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sparseserve.errors import NumericalError, RecipeError
from sparseserve.huggingface.experts import routers_in, unstacked_experts
from sparseserve.retraining.checkpointing import checkpointed_layers
from sparseserve.retraining.losses import (
    Example,
    StoredPredictions,
    dense_predictions,
    next_token_logits,
    prediction_loss,
)
from sparseserve.retraining.retrain import retrain
from sparseserve.retraining.settings import Retraining
from sparseserve.retraining.updates import (
    vector_updates,
)
from sparseserve.testing import TINY_FAMILIES, tiny_model
from tests.unit.retraining.pruned_model import QUICK, bits, prune, pruned


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_zeros_stay_and_only_the_chosen_parts_change(family: str) -> None:
    case = pruned(family)
    before = case.state()
    report = case.retrained(QUICK)
    assert report.kept_epoch > 0
    for name, value in case.state().items():
        module = name.removesuffix(".weight")
        if module in case.operators:
            was_zero = before[name] == 0
            assert bits(value[was_zero]) == bits(before[name][was_zero])
            assert not torch.equal(value, before[name])
        elif value.ndim == 1:
            assert not torch.equal(value, before[name])
        else:
            assert bits(value) == bits(before[name])


@pytest.mark.parametrize("distillation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("learning_rate", [3e-3, 3.0])
def test_held_out_loss_never_rises(distillation: float, learning_rate: float) -> None:
    case = pruned()
    before = case.state()
    report = case.retrained(
        replace(QUICK, distillation=distillation, learning_rate=learning_rate, held_out=0.4)
    )
    best = min(epoch.loss for epoch in report.epochs)
    assert report.after.loss == pytest.approx(min(best, report.before.loss), abs=1e-6)
    held_out = [
        prediction_loss(case.model, Example(case.windows[n], case.dense[n]), distillation)
        for n in (1, 4)
    ]
    total = sum(float(loss.total) for loss in held_out) / 2
    assert report.after.loss == pytest.approx(total, abs=1e-6)
    if not report.kept_epoch:
        assert all(bits(value) == bits(before[name]) for name, value in case.state().items())
    if learning_rate > 1:
        assert report.kept_epoch == 0


def test_equal_seeds_give_equal_bytes_and_others_do_not() -> None:
    states = []
    for seed in (0, 0, 1):
        case = pruned("gemma2")
        case.retrained(replace(QUICK, seed=seed))
        states.append(b"".join(bits(value) for value in case.state().values()))
    assert states[0] == states[1] != states[2]


def test_all_kept_weights_can_be_trained_and_zeros_stay() -> None:
    case = pruned("qwen3")
    before = case.state()
    report = case.retrained(replace(QUICK, every_weight=True))
    assert report.kept_epoch > 0
    kept = sum(int((before[f"{name}.weight"] != 0).sum()) for name in case.operators)
    for name in case.operators:
        weight, old = case.model.get_submodule(name).weight, before[f"{name}.weight"]
        assert bits(weight[old == 0]) == bits(old[old == 0])
        # Weights that no gradient reached are few.
        assert int((weight != old)[old != 0].sum()) > 0.95 * int((old != 0).sum())
    assert report.trained_parameters > kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_trained_experts_stay_when_they_are_one_tensor_again(
    family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family).to(dtype)
    with unstacked_experts(model):
        case = prune(model)
        before = case.state()
        report = case.retrained(replace(QUICK, every_weight=True))
        trained = case.state()
    assert report.kept_epoch > 0
    experts = [name for name in case.operators if ".experts." in name]
    moved = [not torch.equal(before[f"{n}.weight"], trained[f"{n}.weight"]) for n in experts]
    assert sum(moved) > 0.5 * len(experts)
    with unstacked_experts(model):
        assert {name: bits(value) for name, value in case.state().items()} == {
            name: bits(value) for name, value in trained.items()
        }


def test_without_low_rank_updates_the_operators_keep_their_bytes() -> None:
    case = pruned("opt")
    before = case.state()
    report = case.retrained(replace(QUICK, rank=0, biases=False))
    assert report.kept_epoch > 0
    changed = {name for name, value in case.state().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("norm" in name and name.endswith("weight") for name in changed)


def test_low_rank_updates_alone_leave_norms_and_biases() -> None:
    case = pruned("gpt2")
    before = case.state()
    case.retrained(replace(QUICK, norms=False, biases=False))
    changed = {name for name, value in case.state().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in case.operators}


def test_checkpointing_changes_no_byte() -> None:
    states = []
    for checkpointing in (True, False):
        case = pruned("mistral")
        case.retrained(replace(QUICK, checkpointing=checkpointing))
        states.append(b"".join(bits(value) for value in case.state().values()))
    assert states[0] == states[1]


def test_checkpointed_layers_run_again_for_their_gradients() -> None:
    case = pruned()
    calls = []
    linear = case.model.get_submodule(case.operators[0])
    linear.register_forward_hook(lambda *_: calls.append(1))
    case.model.get_parameter("model.norm.weight").requires_grad_(True)
    case.model.get_input_embeddings().requires_grad_(True)
    with checkpointed_layers(case.model, case.windows[0]):
        calls.clear()
        loss = prediction_loss(case.model, Example(case.windows[0], None), 0.0).total
        torch.autograd.backward([loss])
    assert len(calls) == 2


def test_a_16_bit_model_keeps_its_dtype_its_zeros_and_the_loss_of_its_rounded_weights() -> None:
    case = pruned(dtype=torch.bfloat16)
    before = case.state()
    report = case.retrained(QUICK)
    after = case.state()
    assert report.kept_epoch > 0
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    for name in case.operators:
        zeros = before[f"{name}.weight"] == 0
        assert torch.equal(after[f"{name}.weight"] == 0, zeros)
    # The fourth of six windows is the one held out.
    exact = prediction_loss(case.model.float(), Example(case.windows[3], case.dense[3]), 1.0).total
    assert report.after.loss == pytest.approx(float(exact), abs=1e-5)
    assert report.after.loss < report.before.loss


def test_the_model_is_left_without_gradients_wrappers_or_updates() -> None:
    case = pruned()
    names = [name for name, _ in case.model.named_modules()]
    kinds = [type(module) for module in case.model.modules()]
    parameters = list(case.model.parameters())
    case.retrained(QUICK)
    assert [name for name, _ in case.model.named_modules()] == names
    assert [type(module) for module in case.model.modules()] == kinds
    for own, other in zip(case.model.parameters(), parameters, strict=True):
        assert own is other
        assert not own.requires_grad
    assert not any("forward" in vars(module) for module in case.model.modules())


def test_distillation_over_the_whole_vocabulary_is_the_divergence_of_the_textbook() -> None:
    case = pruned()
    window = case.windows[0]
    dense_model = tiny_model("llama")
    (whole,) = dense_predictions(dense_model, [window], likeliest=10_000)
    expected = functional.kl_div(
        next_token_logits(case.model, window).log_softmax(1),
        next_token_logits(dense_model, window).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    found = prediction_loss(case.model, Example(window, whole), 1.0)
    torch.testing.assert_close(found.total, expected)
    (some,) = dense_predictions(dense_model, [window], likeliest=16)
    bound = prediction_loss(case.model, Example(window, some), 1.0).total
    assert 0 < float(bound) < float(expected)
    assert torch.allclose(some.log_probabilities.exp().sum(1), torch.ones(len(window) - 1))


def test_predictions_are_the_same_when_they_wait_on_disk(tmp_path: Path) -> None:
    kept, stored = pruned(), pruned()
    on_disk = StoredPredictions.write(tmp_path / "predictions", iter(stored.dense))
    assert len(on_disk) == len(kept.dense)
    for one, other in zip(on_disk[1:3], kept.dense[1:3], strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.log_probabilities, other.log_probabilities)
    found = replace(stored, dense=on_disk).retrained(QUICK)
    assert replace(found, seconds=0.0) == replace(kept.retrained(QUICK), seconds=0.0)
    assert all(torch.equal(kept.state()[name], value) for name, value in stored.state().items())


def test_cross_entropy_is_what_the_model_itself_reports() -> None:
    case = pruned()
    ids = case.windows[0][None]
    expected = case.model(input_ids=ids, labels=ids).loss
    found = prediction_loss(case.model, Example(ids[0], None), 0.0)
    torch.testing.assert_close(found.total, expected)


def test_progress_counts_every_window_of_every_epoch() -> None:
    case = pruned()
    seen: list[tuple[int, int]] = []
    retrain(
        case.model,
        case.operators,
        case.windows,
        replace(QUICK, distillation=0.0),
        on_window=lambda done, total, loss: seen.append((done, total)),
    )
    # Of 6 windows one is held out; two at a time.
    assert seen == [(done, 10) for done in (2, 4, 5, 7, 9, 10)]


def test_one_window_is_too_few() -> None:
    case = pruned()
    with pytest.raises(RecipeError, match="--samples 2"):
        retrain(case.model, case.operators, case.windows[:1], replace(QUICK, distillation=0.0))


def test_a_loss_that_is_not_finite_stops_the_run_and_restores_the_model() -> None:
    case = pruned()
    case.model.get_parameter("model.norm.weight").data.fill_(torch.inf)
    before = case.state()
    with pytest.raises(NumericalError, match="retraining: the loss is nan"):
        case.retrained(QUICK)
    assert all(torch.equal(value, before[name]) for name, value in case.state().items())


@pytest.mark.parametrize(
    "knobs",
    [
        {"rank": -1},
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"distillation": 1.5},
        {"warmup": 1.0},
        {"held_out": 0.0},
        {"rank": 0, "norms": False, "biases": False},
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="retraining"):
        Retraining(**knobs)  # type: ignore[arg-type]  # wrong values are the point


def test_the_bias_of_a_router_is_not_trained() -> None:
    model = tiny_model("gpt_oss")
    with unstacked_experts(model):
        updates = vector_updates(model, norms=True, biases=True)
        trained = {id(update.module) for update in updates}
        routers = [model.get_submodule(name) for name in routers_in(model)]
        assert all(router.get_parameter("bias").ndim == 1 for router in routers)
        assert len(routers) == 2
        assert not {id(router) for router in routers} & trained
        assert id(model.get_submodule("model.layers.0.mlp.experts.0.up_proj")) in trained


def test_products_can_be_rounded_while_what_is_trained_stays_float32() -> None:
    exact, rounded = pruned(), pruned()
    report = exact.retrained(replace(QUICK, checkpointing=True))
    found = retrain(
        rounded.model,
        rounded.operators,
        rounded.windows,
        replace(QUICK, checkpointing=True),
        dense=rounded.dense,
        autocast_to=torch.bfloat16,
    )
    assert found.kept_epoch == report.kept_epoch > 0
    assert found.before.loss != report.before.loss
    gain = report.before.loss - report.after.loss
    assert found.before.loss - found.after.loss == pytest.approx(gain, rel=0.1)
    assert {value.dtype for value in rounded.model.parameters()} == {torch.float32}
    logits = rounded.model(rounded.windows[0][None]).logits
    assert logits.dtype == torch.float32, "the model computes as before when it is done"
