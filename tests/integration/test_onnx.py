"""ONNX exports, run by onnxruntime and onnxruntime-genai."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseserve.checkpoint.artifact import Artifact, write_manifest
from sparseserve.checkpoint.verification import verify
from sparseserve.errors import ArtifactError
from sparseserve.exporters import export_onnx
from sparseserve.exporters.onnx.agreement import teacher_forced
from sparseserve.exporters.onnx.graph import DATA_FILE, GRAPH_FILE
from sparseserve.exporters.onnx.weights import linear_weights
from sparseserve.layerwise.progress import PruneProgress
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.testing import TINY_FAMILIES, save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import plan, prune_and_export
from tests.integration.command_line import Cli
from tests.integration.conftest import Prune

pytestmark = pytest.mark.timeout(600)
REPRESENTATIVES = ("llama", "gemma3_text")
FAMILIES = [
    pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.further)
    for name in TINY_FAMILIES
]
Packed = Callable[[str], Artifact]
Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def packed(
    tmp_path_factory: pytest.TempPathFactory, prune_into: Prune
) -> Callable[[str], Artifact]:
    made: dict[str, Artifact] = {}

    def get(family: str) -> Artifact:
        if family not in made:
            made[family] = prune_into(tmp_path_factory.mktemp(family) / "packed", family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, packed: Packed) -> Exported:
    """Export a family once, in float32."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "onnx"
            made[family] = export_onnx(packed(family), folder).path
        return made[family]

    return get


def session(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        str(folder / GRAPH_FILE), providers=["CPUExecutionProvider"]
    )


def dense_model(artifact: Artifact) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 5, 17])
def test_logits_are_the_models_from_an_empty_past_to_beyond_its_windows(
    exported: Exported, packed: Packed, family: str, prompt: int
) -> None:
    ids = torch.arange(3 * 41).view(3, 41) % 250
    mask = torch.ones_like(ids)
    found = teacher_forced(session(exported(family)), ids, mask, prompt)
    with torch.no_grad():
        expected = dense_model(packed(family))(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_nothing(exported: Exported, family: str) -> None:
    graph = session(exported(family))
    ids = torch.arange(9).view(1, 9)
    alone = teacher_forced(graph, ids, torch.ones_like(ids), 5)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    beside = teacher_forced(graph, padded.repeat(2, 1), mask.repeat(2, 1), 9)
    torch.testing.assert_close(beside[1:, 4:], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_generates_the_models_tokens(
    exported: Exported, packed: Packed, family: str
) -> None:
    prompt, count = list(range(10, 22)), 20
    model = onnxruntime_genai.Model(str(exported(family)))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    expected = greedy(dense_model(packed(family)), prompt, count)
    assert found == expected[: len(found)]
    assert len(found) == count or found[-1] == 258  # the end of a text


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.further)]
)
def test_sixteen_bit_exports_are_verified(
    packed: Packed, tmp_path: Path, dtype: torch.dtype
) -> None:
    artifact = export_onnx(packed("llama"), tmp_path / "onnx", dtype)
    verify(artifact.path)
    report = artifact.manifest.report["onnx"]
    assert report["equal_weights"] == 14
    assert (report["difference"] is None) == (dtype == torch.bfloat16)
    stored = {
        tensor.data_type for tensor in onnx.load(artifact.path / GRAPH_FILE).graph.initializer
    }
    wanted = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}
    assert wanted[dtype] in stored


def rewritten(source: Path, copy: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """Write a copy of an export with hashes of its own after ``change``."""
    artifact = Artifact.open(source)
    copy.mkdir()
    for name in artifact.manifest.files:
        if name not in {GRAPH_FILE, DATA_FILE}:
            (copy / name).write_bytes((source / name).read_bytes())
    model = onnx.load(source / GRAPH_FILE)
    change(model)
    onnx.save(model, copy / GRAPH_FILE, save_as_external_data=True, location=DATA_FILE)
    write_manifest(copy, replace(artifact.manifest, files={}))
    return copy


MODULE = "model.layers.1.mlp.down_proj"


def fill_weight(model: onnx.ModelProto) -> None:
    (tensor,) = (item for item in model.graph.initializer if item.name == f"{MODULE}.weight")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[:] = 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def forget_name(model: onnx.ModelProto) -> None:
    (node,) = (item for item in model.graph.node if item.name == MODULE)
    node.name = "some_product"


def break_graph(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fill_weight, f"{MODULE} is not 2:4: row 0"),
        (forget_name, f"no product is that of {MODULE}"),
        (break_graph, "is no valid ONNX graph"),
    ],
)
def test_verify_names_what_is_wrong_in_a_graph(
    exported: Exported, tmp_path: Path, change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    folder = rewritten(exported("llama"), tmp_path / "changed", change)
    with pytest.raises(ArtifactError, match=reason):
        verify(folder)


def test_a_weight_is_found_behind_what_only_turns_or_casts_it() -> None:
    weight = torch.tensor([[0.0, 1, 0, 2], [3, 0, 4, 0]])
    helper = onnx.helper
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "cast"], ["y"], name="product"),
        helper.make_node("Gemm", ["x", "w"], ["z"], name="gemm", transB=1),
        helper.make_node("MatMul", ["x", "x"], ["u"], name="no weight"),
    ]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 4])
    stored = onnx.numpy_helper.from_array(weight.numpy(), "w")
    graph = helper.make_graph(nodes, "graph", [value], [], [stored])
    found = dict(linear_weights(graph))
    assert found.keys() == {"product", "gemm"}
    assert all(tensor.equal(weight) for tensor in found.values())


def test_a_damaged_checkpoint_is_not_exported(packed: Packed, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed("llama").path, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        export_onnx(Artifact.open(copy), tmp_path / "onnx")


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(
    packed: Packed, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="more than keys and values"):
        export_onnx(packed("granitemoehybrid"), tmp_path / "onnx")


def test_commands_that_read_weights_refuse_an_export_for_others_in_one_line(
    exported: Exported, cli: Cli
) -> None:
    folder = exported("llama")
    for command in (["export", folder, "-o", "out", "--format", "dense"], ["evaluate", folder]):
        done = cli(*command)
        assert done.returncode != 0
        assert "made for other programs" in done.stderr
    assert cli("verify", folder).returncode == 0


@pytest.mark.skipif(find_spec("vllm") is None, reason="serving needs vLLM")
def test_vllm_is_not_given_an_export_for_others(exported: Exported, cli: Cli) -> None:
    folder = exported("llama")
    done = cli("serve", "--dry-run", folder)
    assert done.returncode != 0
    assert "vLLM serves packed24 and dense checkpoints, not onnx" in done.stderr


def test_without_its_packages_the_command_that_brings_them_is_named(
    packed: Packed, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseserve.checkpoint.formats.find_spec", lambda name: None)
    done = cli("export", packed("llama").path, "-o", tmp_path / "out", "--format", "onnx")
    assert "pip install 'sparseserve[onnx]'" in done.stderr
    assert not (tmp_path / "out").exists()


def refusal(source: Path, recipe: PruneRecipe, export_format: str) -> str:
    """Return what refuses both the rehearsal and the run, which prunes nothing before it."""

    class Unheard(PruneProgress):
        def layer_started(self, name: str, number: int, total: int) -> None:
            raise AssertionError(name)

    job = Job(str(source), recipe, export_format, progress=Unheard())
    with pytest.raises(ArtifactError) as planned:
        plan(job)
    with pytest.raises(ArtifactError) as run:
        prune_and_export(job, source.with_name("out"))
    assert str(planned.value) == str(run.value)
    return str(run.value)


@pytest.mark.parametrize("export_format", ["onnx", "tensorrt"])
def test_experts_that_a_graph_cannot_tell_are_refused_before_they_are_pruned(
    tmp_path: Path, quick: PruneRecipe, export_format: str
) -> None:
    source = save_tiny_model("olmoe", tmp_path / "model")
    message = refusal(source, quick, export_format)
    assert message.startswith(f"model.layers.0.mlp.experts.0.gate_proj: {export_format} ")
    assert message.endswith("use --experts dense or --format dense")


def test_with_dense_experts_the_rest_of_the_model_is_exported(
    prune: Prune, quick: PruneRecipe
) -> None:
    made = prune("olmoe", recipe=replace(quick, experts="dense"), export_format="onnx")
    verify(made.path)
    assert made.manifest.pruned
    assert not any("experts" in name for name in made.manifest.pruned)


@pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")
@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("granitemoehybrid", "more than keys and values"),
        ("falcon_h1", "more than keys and values"),
        ("gemma4_text", "heads of different numbers or sizes"),
    ],
)
def test_layers_that_a_graph_cannot_hold_are_refused_before_they_are_pruned(
    tmp_path: Path, quick: PruneRecipe, family: str, told: str
) -> None:
    message = refusal(save_tiny_model(family, tmp_path / "model"), quick, "onnx")
    assert told in message
    assert message.endswith("use --format dense")
