"""What attempts at damaged inputs share: copies of a corpus, seals, and comparisons."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseserve.checkpoint.artifact import MANIFEST_FILE, FileEntry, Manifest, file_sha256


class WrongAnswerError(Exception):
    """An input was accepted, and what was read is not what its bytes say."""


def require_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if found.keys() != wanted.keys():
        raise WrongAnswerError(f"other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, tensor in found.items():
        if tensor.dtype != wanted[name].dtype or tensor.shape != wanted[name].shape:
            raise WrongAnswerError(f"{name} is another tensor than its bytes say")
        if not torch.equal(tensor.nan_to_num(7), wanted[name].nan_to_num(7)):
            raise WrongAnswerError(f"{name} has other values than its bytes say")


def copied(source: Path, target: Path) -> Path:
    """Link the files of ``source``; what is then replaced changes no original."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def put(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def sealed(body: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest's JSON with the digest that belongs to it."""
    kept = {key: value for key, value in body.items() if key != "manifest_sha256"}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return {**kept, "manifest_sha256": digest}


def seal_files(folder: Path) -> None:
    """Make the manifest vouch for the files as they are now."""
    where = folder / MANIFEST_FILE
    manifest = Manifest.from_json(json.loads(where.read_text()), where)
    files = {
        name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
        for name in manifest.files
    }
    put(where, json.dumps(replace(manifest, files=files).to_json()).encode())
