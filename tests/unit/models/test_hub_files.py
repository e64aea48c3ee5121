"""Which files of a repository on the hub are downloaded."""

from __future__ import annotations

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from sparseserve.models.model_folder import UNWANTED_FILES, WANTED_FILES


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config.json", True),
        ("modeling_own.py", True),  # config.json may name it; it is copied and never run
        ("LICENSE", True),
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
