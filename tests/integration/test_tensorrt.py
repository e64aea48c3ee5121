"""The folder for TensorRT, without TensorRT and without a card; and its builder on TensorRT-RTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from tests.integration.command_line import Cli
from tests.integration.conftest import Prune

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        find_spec("tensorrt") is not None and torch.cuda.is_available(), reason="builds an engine"
    ),
]
RTX = "1.7.1.116"
BUILD = """
import json, sys
from pathlib import Path
import tensorrt_rtx
from sparseserve.exporters.tensorrt.build import build_engine
from sparseserve.exporters.tensorrt.settings import InputRange
folder = Path(sys.argv[1])
inputs = json.loads((folder / "build.json").read_text())["inputs"]
ranges = [
    InputRange(item["name"], *(tuple(item[size]) for size in ("smallest", "best", "largest")))
    for item in inputs
]
print(len(build_engine(tensorrt_rtx, folder / "model.onnx", ranges).engine))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, prune_into: Prune) -> Path:
    root = tmp_path_factory.mktemp("tensorrt")
    packed = prune_into(root / "packed", "llama").path
    command = [sys.executable, "-m", "sparseserve", "export", str(packed)]
    sizes = ["--max-batch", "2", "--max-new", "32", "--max-past", "128"]
    done = subprocess.run(
        [*command, "-o", str(root / "out"), "--format", "tensorrt", *sizes],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "There is no engine: TensorRT is not installed" in done.stderr
    assert "trtexec --onnx=model.onnx" in done.stderr
    return root / "out"


def test_without_an_engine_the_folder_holds_the_graph_and_what_builds_one(exported: Path) -> None:
    manifest = verify(exported).manifest
    assert manifest.format == "tensorrt"
    assert manifest.report["tensorrt"]["engine"] is None
    assert manifest.report["onnx"]["dtype"] == "float16"
    told = json.loads((exported / "build.json").read_text())
    assert told["engine"] is None
    assert told["settings"]["max_batch"] == 2
    assert "--maxShapes=input_ids:2x32,attention_mask:2x160" in told["trtexec"]
    compile(told["torch_tensorrt"], "build.json", "exec")


def test_options_of_the_engine_are_refused_with_other_formats(exported: Path, cli: Cli) -> None:
    packed = exported.parent / "packed"
    done = cli("export", packed, "-o", "out", "--format", "dense", "--max-batch", 2)
    assert done.returncode == 1
    assert "--max-batch is for --format tensorrt, not dense" in done.stderr
    done = cli("export", packed, "-o", "out", "--format", "tensorrt", "--max-new", 0)
    assert done.returncode == 1
    assert "--max-new is 0" in done.stderr


def test_an_engine_that_is_named_must_be_there(exported: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from sparseserve.checkpoint.artifact import Artifact, write_manifest

    for name in Artifact.open(exported).manifest.files:
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    told = json.loads((tmp_path / "build.json").read_text())
    (tmp_path / "build.json").write_text(json.dumps({**told, "engine": "model.engine"}))
    write_manifest(tmp_path, replace(Artifact.open(exported).manifest, files={}))
    with pytest.raises(ArtifactError, match=r"names the engine 'model\.engine', the folder holds"):
        verify(tmp_path)


@pytest.mark.further
def test_tensorrt_rtx_parses_the_graph_and_builds_its_engine_without_a_card(
    exported: Path, tmp_path: Path
) -> None:
    packages = [f"tensorrt-rtx-cu13{part}=={RTX}" for part in ("", "-bindings", "-libs")]
    target = ["--quiet", "--no-deps", "--target", str(tmp_path / "rtx")]
    install = [sys.executable, "-m", "pip", "install", *target, *packages]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(exported)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "rtx")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 100_000
