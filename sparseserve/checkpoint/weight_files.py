"""Which files of a folder hold its weights: one answer for every command.

Programs disagree about folders that hold weights twice. transformers takes ``model.safetensors``
before an index, and a name in config.json before both; vLLM reads every safetensors file that an
index does not exclude. A folder that they would read differently is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparseserve.checkpoint.json_file import read_json
from sparseserve.errors import ArtifactError
from sparseserve.paths import shown, shown_value

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
#: Files of these kinds hold weights, in whatever form.
WEIGHT_KINDS = _PICKLES | {
    *(".safetensors", ".tensors", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".npz", ".npy"),
    *(".onnx", ".onnx_data", ".tflite", ".mlmodel", ".engine"),
}
# What programs look for anywhere in a folder, besides weights: code and templates.
_OPENED_ANYWHERE = WEIGHT_KINDS | {".py", ".pyc", ".so", ".jinja"}
# What they look for beside the weights: settings, and the vocabularies of tokenizers.
_OPENED_AT_THE_TOP = frozenset(
    {
        *(".json", ".txt", ".yaml", ".yml", ".xml"),
        *(".model", ".tiktoken", ".spm", ".codes", ".bpe", ".vocab", ".tokenizer"),
    }
)
# Folders of git and of the hub's client, which no reader of models looks into.
_BOOKKEEPING = frozenset({".git", ".cache"})
_LONGEST_NAME = 255  # bytes; no Linux file system takes more


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weights of ``folder``.

    Attributes:
        folder: Where they are.
        names: The files, sorted; plain names that end in ``.safetensors``.
        weight_map: Which of them holds each tensor, if there is an index that says so.
    """

    folder: Path
    names: tuple[str, ...]
    weight_map: dict[str, str] | None = None


def weight_files(folder: Path) -> WeightFiles:
    """Find out which files hold the weights of ``folder``; only index and config.json are read.

    Raises:
        ArtifactError: There are none, they are no safetensors, or readers would disagree.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.exists():
        found = _indexed(index)
        if single.exists() and found.names != (SINGLE_FILE,):
            raise ArtifactError(
                f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, and programs disagree "
                "about which of them counts: remove one"
            )
    elif single.exists():
        found = WeightFiles(folder, (SINGLE_FILE,))
    else:
        raise _no_weights(folder)
    _refuse_redirections(folder, INDEX_FILE if found.weight_map is not None else SINGLE_FILE)
    return found


def refuse_others(files: WeightFiles) -> None:
    """Refuse safetensors beside a single file of weights: vLLM would read them, too.

    Raises:
        ArtifactError: Names the first of them.
    """
    if files.weight_map is not None:
        return
    for path in sorted(files.folder.glob("*.safetensors")):
        if path.name not in files.names:
            raise ArtifactError(
                f"{path}: vLLM reads it beside {SINGLE_FILE}, other programs do not: remove it"
            )


def unlisted_files(folder: Path, listed: frozenset[str]) -> Iterator[str]:
    """Yield the files of ``folder`` that a program might open though they are not ``listed``.

    Anything that is no plain file is among them: a link to a folder, a pipe, a device.
    """
    for name in sorted(_files_below(folder)):
        path = PurePosixPath(name)
        if name in listed or path.parts[0] in _BOOKKEEPING:
            continue
        kind = path.suffix.lower()
        at_the_top = len(path.parts) == 1
        opened = kind in _OPENED_ANYWHERE or (at_the_top and kind in _OPENED_AT_THE_TOP)
        versioned = at_the_top and path.name.startswith("tokenizer.")  # as in tokenizer.model.v3
        if opened or versioned or not (folder / name).is_file():
            yield name


def plain_relative(name: str) -> bool:
    """Whether ``name`` is that of a file in a folder or below it, by whatever means it is read."""
    parts = PurePosixPath(name).parts
    shortest = all(0 < len(part.encode(errors="replace")) <= _LONGEST_NAME for part in parts)
    return (
        bool(parts)
        and shortest
        and not name.startswith("/")
        and ".." not in parts
        and "\0" not in name
        and str(PurePosixPath(name)) == name
    )


def _indexed(index: Path) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: has no weight_map: copy or download it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ArtifactError(
                f"{index}: the file of {shown(tensor)} is {shown_value(name)}, which is no file "
                "name"
            )
        if not plain_relative(name) or "/" in name:
            raise ArtifactError(
                f"{index}: {shown(name)} lies outside the folder, or is no file name"
            )
        if not name.endswith(".safetensors") or name.startswith("."):
            raise ArtifactError(
                f"{index}: {shown(name)} is not named as safetensors: only those are read, "
                "convert the weights or remove the index"
            )
    return WeightFiles(index.parent, tuple(sorted(set(weight_map.values()))), weight_map)


def _refuse_redirections(folder: Path, resolved: str) -> None:
    """Refuse what makes transformers read other weights than ``resolved``, or more."""
    config = folder / CONFIG_FILE
    other = read_json(config).get("transformers_weights") if config.exists() else None
    if other not in (None, resolved):
        raise ArtifactError(
            f"{config}: transformers_weights names {shown_value(other)} instead of {resolved}, "
            "which other programs read: remove the key"
        )
    if (folder / "adapter_config.json").exists():
        raise ArtifactError(
            f"{folder}: holds an adapter (adapter_config.json), which some programs add to the "
            "weights and others do not: merge it into them, or remove it"
        )


def _no_weights(folder: Path) -> ArtifactError:
    if not folder.is_dir():
        return ArtifactError(f"{folder}: no such folder")
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES):
        return ArtifactError(
            f"{folder} holds its weights as {pickles[0]} only, which can run code when read: "
            "convert them to safetensors (load and save_pretrained in transformers)"
        )
    return ArtifactError(f"{folder} has no weights: it holds no {SINGLE_FILE} and no {INDEX_FILE}")


def _files_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(parent) / name).relative_to(folder).as_posix()
