"""Opening a model's files with transformers: the one owner of every ``from_pretrained`` call.

A model's folder may name Python of its own, which transformers would run after a question on the
terminal. Here it is never run and nothing is asked: such a folder is refused in one line. Nothing
is downloaded either, and weights are read from safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    FineGrainedFP8Config,
    Mxfp4Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from sparseserve.errors import SparseServeError, UnsupportedModelError, first_line
from sparseserve.huggingface.config_values import check_files, checked_settings
from sparseserve.huggingface.unread import unread_tensors

#: Quantised forms that are read, and made dense while they are; transformers knows how.
DEQUANTISED: Mapping[str, Callable[..., Any]] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
_REFUSED = "Python code of its own, which is never run"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor whose shape in the file is not the one that config.json asks for."""

    name: str
    stored: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OpenedWeights:
    """A model and how its tensors fitted.

    Attributes:
        model: With the tensors that were found, and random values where none was.
        missing: Names of the tensors that no file holds, in order.
        mismatched: Tensors of another shape than the model's.
        unread: Names of tensors in the files that the model has no place for.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    unread: tuple[str, ...]


def open_config(folder: Path) -> PretrainedConfig:
    """Read the ``config.json`` of ``folder``.

    Raises:
        UnsupportedModelError: It needs code of its own, transformers does not understand it, or a
            value of it is far larger than that of any model.
    """
    checked_settings(folder)
    try:
        with only_errors_logged():
            return AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever transformers' code raises on values it does not expect
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{folder} needs {_REFUSED}: only architectures that are part of transformers "
                "can be opened"
            ) from error
        raise UnsupportedModelError(
            f"{folder}/config.json is not understood: {first_line(error)}"
        ) from error


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of ``folder``.

    Raises:
        UnsupportedModelError: It needs code of its own, is missing, or cannot be read.
    """
    check_files(folder)
    try:
        with only_errors_logged():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever the model's code raises
        own_code = "trust_remote_code" in str(error)
        reason = f"it needs {_REFUSED}" if own_code else first_line(error)
        raise _no_tokenizer(folder, reason) from error
    # With no tokenizer files at all, transformers may build a tokenizer without any words.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise _no_tokenizer(folder, "its files are missing")
    return tokenizer


def open_weights(folder: Path, dtype: torch.dtype | None = None) -> OpenedWeights:
    """Read a causal language model, or a multimodal model around one.

    Weights in a form of ``DEQUANTISED`` become dense ones.

    Args:
        folder: Holds its configuration and safetensors.
        dtype: Floating type of the weights; the checkpoint's own when left out.

    Raises:
        UnsupportedModelError: It cannot be loaded.
    """
    check_files(folder)
    try:
        with only_errors_logged():
            config = open_config(folder)
            model, loading = _kind_of(config).from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # the caller is told, with the tensor's name
                output_loading_info=True,
                **_dequantising(config),
            )
    except SparseServeError:
        raise
    except Exception as error:  # whatever the model's code raises
        raise UnsupportedModelError(f"{folder} cannot be loaded: {first_line(error)}") from error
    found = _opened(folder, model, loading)
    if quantisation_of(config) in DEQUANTISED:
        found = replace(found, mismatched=(*found.mismatched, *_other_shapes(model, config)))
        _forget_quantisation(model)
        _convert_dequantised(model, dtype)
    return found


def quantisation_of(config: PretrainedConfig) -> str | None:
    """Return how the weights are quantised, as config.json calls it; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    return str(settings.get("quant_method") if isinstance(settings, dict) else settings)


def _dequantising(config: PretrainedConfig) -> dict[str, object]:
    """Return the arguments by which transformers makes quantised weights dense."""
    kind = DEQUANTISED.get(quantisation_of(config) or "")
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _other_shapes(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[Mismatch]:
    """Yield parameters of other shapes than asked: of quantised weights transformers tells none."""
    asked = {name: tuple(tensor.shape) for name, tensor in sketch_model(config).named_parameters()}
    for name, tensor in model.named_parameters():
        if name in asked and tuple(tensor.shape) != asked[name]:
            yield Mismatch(name, tuple(tensor.shape), asked[name])


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Make transformers save ``model`` as the dense model that it is now."""
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None  # else the reverse of dequantising is looked for
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)


def sketch_model(config: PretrainedConfig) -> PreTrainedModel:
    """Make the model of ``config`` without memory for its tensors.

    Raises:
        Exception: Whatever the model's own code raises where the values of ``config`` contradict
            each other.
    """
    with torch.device("meta"):
        return _kind_of(config)._model_mapping[type(config)]._from_config(config)


def has_class(config: PretrainedConfig) -> bool:
    """Whether transformers has a language model, or one around it, for ``config``."""
    return type(config) in _kind_of(config)._model_mapping


def is_language_model(config: PretrainedConfig) -> bool:
    """Whether ``config`` names a causal language model, or a multimodal model around one."""
    names = set(config.architectures or ())
    return bool(names & _names(AutoModelForCausalLM) or names & _names(AutoModelForImageTextToText))


def _kind_of(config: PretrainedConfig) -> type[Any]:
    """Return transformers' loader; of what both kinds hold, the one for language models."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind: type[Any] = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    return kind


def _names(kind: type[Any]) -> set[str]:
    return set(kind._model_mapping._model_mapping.values())


def _convert_dequantised(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Round to ``dtype`` what transformers made bfloat16 whatever it was asked for."""
    if dtype is None:
        return
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.dtype == torch.bfloat16 != dtype:
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))


def _opened(folder: Path, model: PreTrainedModel, loading: Mapping[str, Any]) -> OpenedWeights:
    return OpenedWeights(
        model=model,
        missing=tuple(sorted(loading["missing_keys"])),
        mismatched=tuple(
            Mismatch(name, tuple(stored), tuple(expected))
            for name, stored, expected in loading["mismatched_keys"]
        ),
        unread=unread_tensors(folder, model, loading["unexpected_keys"]),
    )


def _no_tokenizer(folder: Path, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder} has no usable tokenizer ({reason}): copy tokenizer.json and "
        "tokenizer_config.json from the original model"
    )


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Keep transformers from logging a table about what is then raised as one line.

    Its progress bars, which say nothing of what they are for, are kept back too.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
