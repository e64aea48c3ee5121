"""Which files of a repository on the hub are downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from sparseserve.models.model_folder import UNWANTED_FILES, WANTED_FILES, hub_name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config.json", True),
        ("modeling_own.py", True),  # config.json may name it; it is copied and never run
        ("LICENSE", True),
        ("README.md", True),
        ("tokenizer.model", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("onnx/config.json", False),
    ],
)
def test_what_comes_along_is_downloaded(name: str, wanted: bool) -> None:
    found = filter_repo_objects(
        [name], allow_patterns=[*WANTED_FILES], ignore_patterns=[*UNWANTED_FILES]
    )
    assert list(found) == [name] * wanted


CACHED = Path("/cache/hub/models--owner--a-model.v2/snapshots") / ("0" * 40)


@pytest.mark.parametrize(
    ("source", "folder", "name"),
    [
        ("owner/a-model.v2", CACHED, "owner/a-model.v2"),
        ("gpt2", CACHED.parents[1].with_name("models--gpt2") / "snapshots" / ("a" * 40), "gpt2"),
        (str(CACHED), CACHED, "owner/a-model.v2"),
        ("owner/a-model", Path("owner/a-model"), None),
        ("models/models--mine", Path("models/models--mine"), None),
    ],
)
def test_a_model_is_from_the_hub_if_it_was_named_so_or_lies_in_its_cache(
    source: str, folder: Path, name: str | None
) -> None:
    assert hub_name(source, folder) == name
