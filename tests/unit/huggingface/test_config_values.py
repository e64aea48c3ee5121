"""What a folder says of itself is bounded before transformers acts on it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseserve.errors import ArtifactError, ServingError, UnsupportedModelError
from sparseserve.huggingface.config_values import layer_counts
from sparseserve.huggingface.opening import open_config, open_tokenizer, open_weights
from sparseserve.models.loading import load_model
from sparseserve.serving.launch.served_model import ServedModel
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.convert import convert
from sparseserve.workflow.inspection import inspect_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_labels": 7 * 10**9}, "num_labels is 7000000000, more than the 100000"),
        ({"max_position_embeddings": 10**12}, "more than the 33554432"),
        ({"text_config": {"num_labels": 10**9}}, "num_labels is 1000000000"),
        ({"text_config": 7}, "text_config is 7, but must be an object"),
        ({"architectures": 7}, "architectures is 7, but must be a list of names"),
        ({"architectures": ["LlamaForCausalLM", 7]}, "must be a list of names"),
    ],
)
def test_a_value_that_no_model_has_is_refused_wherever_a_config_is_opened(
    folder: Path, settings: dict[str, object], part: str
) -> None:
    change_config(folder, **settings)
    with pytest.raises(UnsupportedModelError) as caught:
        open_config(folder)
    assert part in str(caught.value)
    with pytest.raises(ServingError, match=str(folder)):
        ServedModel.open(folder)


def test_more_layers_than_there_are_tensors_are_not_even_sketched(folder: Path) -> None:
    change_config(folder, num_hidden_layers=9999)
    message = r"asks for 9,999 layers \(num_hidden_layers\), its files hold 21 tensors"
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(folder)
    with pytest.raises(ServingError, match=message):
        ServedModel.open(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        convert(str(folder), folder.with_name("out"))


def test_layers_are_counted_by_the_names_that_transformers_gives_them() -> None:
    settings = {"n_layer": 1, "encoder_layers": 2, "a": {"depth": 3}, "layer_norm_eps": 1e-5}
    assert layer_counts(settings) == {"n_layer": 1, "encoder_layers": 2, "depth": 3}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"vocab_size": 10**9}, "config.json asks for 128,000,0"),
        ({"intermediate_size": 2**40}, "weights, its files hold"),
        ({"intermediate_size": -1}, "describes no model that can be built"),
        ({"head_dim": 10**30}, "describes no model that can be built"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0, but must be a positive"),
    ],
)
def test_a_server_is_not_asked_for_what_the_files_cannot_hold(
    folder: Path, settings: dict[str, object], part: str
) -> None:
    change_config(folder, **settings)
    with pytest.raises(ServingError) as caught:
        ServedModel.open(folder)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.txt"])
def test_a_pipe_or_a_file_without_end_beside_the_weights_is_not_opened(
    folder: Path, name: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnsupportedModelError, match="1,099,511,627,776 bytes"):
        open_weights(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UnsupportedModelError, match="is not a plain file"):
        open_tokenizer(folder)


def test_a_quantised_weight_of_another_shape_is_refused(folder: Path) -> None:
    # transformers compares no shapes where weights are quantised.
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 32)
    save_file(tensors, path, metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight is \[128, 32\], but config"):
        load_model(folder)


def test_a_quantisation_that_transformers_chokes_on_is_refused(folder: Path) -> None:
    index = {"metadata": "x", "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"))}
    index["weight_map"] = dict.fromkeys(index["weight_map"], "a.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        load_model(folder)


def test_an_empty_matrix_has_no_pattern(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(0, 4), "b": torch.zeros(3, 0)}, tmp_path / "a.safetensors")
    assert [item.pattern for item in inspect_checkpoint(tmp_path / "a.safetensors").matrices] == [
        "dense",
        "dense",
    ]


def test_a_header_with_a_line_break_is_refused_in_one_line(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F\\n2","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError) as caught:
        inspect_checkpoint(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
