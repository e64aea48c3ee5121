"""A configuration that asks for more than the files hold takes no memory for it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from sparseserve.errors import UnsupportedModelError
from sparseserve.models.loading import load_model
from sparseserve.models.model_folder import check_model_folder
from sparseserve.testing import TINY_FAMILIES, save_tiny_model


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refusal(folder: Path) -> str:
    """The refusal, and proof that it took less than 500 MB more than there were."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_asks_for_what_its_files_hold(tmp_path: Path, family: str) -> None:
    check_model_folder(save_tiny_model(family, tmp_path / "model"))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"vocab_size": 2**31}, "model.embed_tokens.weight is [264, 64], but config.json asks"),
        ({"intermediate_size": 2**34}, "config.json asks for [17179869184, 64]"),
        ({"hidden_size": 2**24}, "config.json asks for"),
        ({"hidden_size": 2**62}, "describes no model that can be built"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than the 10000"),
        ({"num_attention_heads": 2**40}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"head_dim": 2**40}, "config.json asks for"),
        ({"hidden_act": "no such function"}, "describes no model that can be built"),
    ],
)
def test_a_huge_or_impossible_size_is_refused_before_it_is_taken(
    tmp_path: Path, settings: dict[str, object], part: str
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    change_config(folder, **settings)
    assert part in refusal(folder)


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "n_layers", "num_decoder_layers"])
def test_layers_are_counted_by_whatever_name_and_depth(tmp_path: Path, key: str) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    change_config(folder, text_config={key: 10**12})
    assert f"{key} is 1000000000000" in refusal(folder)


def test_a_config_that_would_never_end_or_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    path = folder / "config.json"
    path.write_text('{"a":' * 100_000)
    assert "cannot be read as JSON" in refusal(folder)
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "1,099,511,627,776 bytes" in refusal(folder)
