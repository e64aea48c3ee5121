"""From what the user calls a model to a folder that is known to hold a dense causal LM."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from sparseserve.checkpoint.formats import METHOD
from sparseserve.checkpoint.weight_files import weight_files
from sparseserve.errors import ArtifactError, UnsupportedModelError, first_line
from sparseserve.huggingface.asked_size import check_asked_size, dense_shapes
from sparseserve.huggingface.config_values import checked_settings
from sparseserve.huggingface.opening import DEQUANTISED, is_language_model, open_config
from sparseserve.paths import local_path, shown

# What is read, and what comes along with the weights: card, licence, and code, which is never run.
WANTED_FILES = (
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"),
    *("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*", "README.md"),
)
# Top level of the repository only; "consolidated" files repeat the weights in another layout.
UNWANTED_FILES = ("*/*", "consolidated*")
_CACHED = re.compile(r"/models--(?P<name>[\w.-]+)/snapshots/[0-9a-f]{40}/?$")


def find_model_folder(source: str | Path) -> Path:
    """Return the local folder of ``source``, downloading it when it is a hub name.

    Raises:
        UnsupportedModelError: ``source`` is neither a folder nor a model the hub gives out.
    """
    path = local_path(source, "model", UnsupportedModelError)
    if path.is_dir():
        return path
    if path.exists():
        raise UnsupportedModelError(
            f"model '{source}' is a file: give the folder that holds its config.json"
        )
    try:
        # Falls back to the local cache when the hub cannot be reached.
        folder = snapshot_download(
            str(source),
            allow_patterns=list(WANTED_FILES),
            ignore_patterns=list(UNWANTED_FILES),
        )
    except (OSError, HFValidationError) as error:
        raise UnsupportedModelError(
            f"no such model {shown(source)}: there is no folder of that name, and the hub gives "
            f"none ({first_line(error)}): give a model's folder, or OWNER/NAME as the hub has it, "
            "after 'hf auth login' if it is private or gated"
        ) from error
    return Path(folder)


def hub_name(source: str | Path, folder: Path) -> str | None:
    """Return the name on the hub of the model ``source``, whose files lie in ``folder``.

    A folder in the hub's own cache has the name in its path. No other folder says where it is from.
    """
    if str(folder) != str(local_path(source, "model", UnsupportedModelError)):
        return str(source)
    cached = _CACHED.search(folder.absolute().as_posix())
    return "/".join(cached["name"].split("--", 1)) if cached else None


def check_model_folder(folder: Path) -> None:
    """Make sure that ``folder`` describes a dense causal LM and holds whole safetensors shards.

    Only the configuration and the headers of the shards are read, and the two are compared.

    Raises:
        UnsupportedModelError: Something else lies there, or part of it is missing or cut short.
    """
    _check_settings(folder)
    config = _checked_config(folder)
    try:
        shards = [folder / name for name in weight_files(folder).names]
    except ArtifactError as error:
        raise UnsupportedModelError(str(error)) from error
    for shard in shards:
        _check_shard(shard)
    check_asked_size(folder, config, dense_shapes(shards))


def _check_settings(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModelError(
            f"{folder} has no config.json: give a folder saved by transformers' save_pretrained"
        )
    quantization = checked_settings(folder).get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method in DEQUANTISED:
        return
    if method == METHOD:
        raise UnsupportedModelError(
            f"{folder} is already a packed24 checkpoint: prune the dense model it was made from"
        )
    raise UnsupportedModelError(
        f"{folder} is quantised ({method or 'unknown method'}): only dense models can be pruned, "
        f"and those in {' or '.join(DEQUANTISED)}: give the original"
    )


def _checked_config(folder: Path) -> PretrainedConfig:
    config = open_config(folder)
    if not is_language_model(config):
        none = f"no architecture, model type {config.model_type}"
        found = ", ".join(config.architectures or []) or none
        raise UnsupportedModelError(
            f"{folder} is not a causal language model: its config.json names {found}; "
            "a decoder with a language head, such as LlamaForCausalLM, is needed, or a model that "
            "adds images to one"
        )
    return config


def _check_shard(path: Path) -> None:
    if not path.is_file():
        raise UnsupportedModelError(
            f"{path} is missing, though model.safetensors.index.json names it: download it again"
        )
    try:
        with safe_open(path, framework="pt"):  # checks that the header covers the file exactly
            pass
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(
            f"{path} is cut short or damaged ({path.stat().st_size} bytes; {first_line(error)}): "
            "download it again"
        ) from error
