"""Settings every test runs under: no network, one thread a process, quiet libraries."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The same examples every time, and no limit on a first example that pays for warm-up.
settings.register_profile("sparseserve", deadline=None, derandomize=True)
settings.load_profile("sparseserve")

# Read when torch is imported, which is later. Processes of more threads would share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start vLLM first, and skip ``gpu`` tests where torch sees no CUDA device."""
    import torch

    # Test processes take whole files, in this order: a long one last would leave the others idle.
    slow = {item.path for item in items if item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))
