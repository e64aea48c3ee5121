"""A model is loaded whole, or refused in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from sparseserve.errors import NumericalError, UnsupportedModelError
from sparseserve.models.loading import load_model
from sparseserve.testing import TINY_FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that cannot be reached, and an empty cache of what was downloaded before."""
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(source: str | Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_config_with_fewer_layers_than_the_files_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert "model.layers.1." in message
    assert "fewer layers" in message


def test_layers_that_predict_several_tokens_are_not_meant_by_that(tmp_path: Path) -> None:
    folder = save_tiny_model("deepseek_v3", tmp_path / "model")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    name = f"model.layers.{layers}.eh_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    change_config(folder, num_nextn_predict_layers=0)
    assert name in refusal(folder)
    change_config(folder, num_nextn_predict_layers=1)
    assert load_model(folder).unread == (name,)


def split_into_shards(folder: Path) -> list[Path]:
    tiny_model("llama").save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_saved_model_comes_back_the_same_and_ready_to_prune(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path)
    expected = tiny_model(family).state_dict()

    loaded = load_model(path)

    weights = loaded.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config.use_cache  # as the checkpoint says: what is exported inherits it
    assert loaded.source == str(path)
    assert loaded.folder == path
    text = "Grüße, 2:4!"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert max(loaded.tokenizer(text)["input_ids"]) < loaded.model.config.vocab_size


def test_the_dtype_is_the_checkpoint_s_own_unless_another_is_asked_for(tmp_path: Path) -> None:
    path = save_tiny_model("llama", tmp_path, dtype=torch.bfloat16)

    assert {p.dtype for p in load_model(path).model.parameters()} == {torch.bfloat16}
    wide = load_model(path, dtype=torch.float32).model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_a_sharded_checkpoint_is_read_from_all_its_shards(folder: Path) -> None:
    split_into_shards(folder)

    weights = load_model(folder).model.state_dict()

    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_hub_name_is_found_in_the_local_cache_without_a_network(offline: Path) -> None:
    repository = offline / "models--someone--tiny"
    snapshot = save_tiny_model("llama", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)

    loaded = load_model("someone/tiny")

    assert loaded.source == "someone/tiny"
    assert loaded.folder == snapshot
    assert len(loaded.tokenizer) == len(tiny_tokenizer())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["someone/absent", "absent", "not/a/hub/name", "/no/such/folder"])
def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_refused(name: str) -> None:
    message = refusal(name)
    assert f"no such model '{name}'" in message
    assert "there is no folder of that name, and the hub gives none" in message
    assert "give a model's folder, or OWNER/NAME" in message


def test_a_file_is_not_a_model(folder: Path) -> None:
    assert "is a file: give the folder" in refusal(folder / "model.safetensors")


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()

    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is not understood: Unrecognized model"),
        ('{"model_type": "nothing-known"}', "is not understood"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is not understood"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(folder: Path, content: str, reason: str) -> None:
    (folder / "config.json").write_text(content)

    assert reason in refusal(folder)


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    change_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    )
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")

    assert "needs Python code of its own, which is never run" in refusal(folder)
    assert not (folder / "ran").exists()


def test_a_classifier_is_not_a_causal_language_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)

    message = refusal(tmp_path)
    assert "is not a causal language model" in message
    assert "BertForSequenceClassification" in message


def test_an_encoder_decoder_is_not_a_causal_language_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "t5", d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, vocab_size=32
    )
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)

    assert "names T5ForConditionalGeneration" in refusal(tmp_path)


def test_a_config_without_an_architecture_is_refused(folder: Path) -> None:
    change_config(folder, architectures=None)

    assert "names no architecture, model type llama" in refusal(folder)


def test_a_packed_checkpoint_is_not_pruned_again(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "sparseserve", "version": 1})

    assert "is already a packed24 checkpoint: prune the dense model" in refusal(folder)


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})

    assert "is quantised (gptq)" in refusal(folder)


def test_a_checkpoint_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    assert "has no weights: it holds no model.safetensors" in refusal(folder)


def test_pickled_weights_are_refused_with_the_remedy(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")

    message = refusal(folder)
    assert "pytorch_model.bin only" in message
    assert "convert them to safetensors" in message


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = split_into_shards(folder)[1]
    shard.unlink()

    assert f"{shard} is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_a_shard_cut_short_is_named(folder: Path, keep: int) -> None:
    shard = split_into_shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:keep])

    assert f"{shard} is cut short or damaged ({shard.stat().st_size} bytes" in refusal(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}'])
def test_an_index_without_a_weight_map_is_refused(folder: Path, content: str) -> None:
    split_into_shards(folder)
    (folder / "model.safetensors.index.json").write_text(content)

    assert "has no weight_map" in refusal(folder)


def test_a_missing_tensor_is_named_rather_than_drawn_at_random(folder: Path) -> None:
    missing = "model.layers.1.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.pop(missing))

    assert f"1 tensors are missing from the checkpoint, the first is {missing}" in refusal(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))

    message = refusal(folder)
    assert "tensor model.norm.weight is [65], but config.json asks for [64]" in message


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gemma2", "phi3", "gpt2"])
def test_a_missing_tokenizer_is_refused_in_every_family(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()

    assert "has no usable tokenizer" in refusal(path)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_first_tensor_that_is_not_finite_is_named(folder: Path, poison: float) -> None:
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def poisoned(tensors: dict[str, Tensor]) -> None:
        tensors[second][0, 0] = tensors[first][2, 3] = tensors[first][2, 4] = poison

    change_tensors(folder, poisoned)

    with pytest.raises(NumericalError, match=rf"tensor {first} has 2 NaN or infinite values of"):
        load_model(folder)


def test_weights_that_overflow_in_the_asked_dtype_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))

    load_model(folder)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight has 64 .* overflows in float16"):
        load_model(folder, dtype=torch.float16)
