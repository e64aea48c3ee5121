"""The card that every written folder gets: what it says, and what it follows from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from sparseserve.budget.price_run import HeldOutSpec
from sparseserve.budget.report import KeepDenseFraction
from sparseserve.budget.within_budget import prune_within_budget
from sparseserve.checkpoint.artifact import CARD_FILE, MANIFEST_FILE, Artifact
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.uses import uses_of
from sparseserve.checkpoint.verification import verify
from sparseserve.cli.main import cli as commands
from sparseserve.exporters.model_card import finish_checkpoint, model_card, read_source_card
from sparseserve.exporters.side_files import SOURCE_CARD_FILE
from sparseserve.recipe.steps import Reconstruction
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import export

SOURCE = """---
license: other
license_name: own-licence
license_link: LICENSE
language: [en, de]
pipeline_tag: image-text-to-text
base_model: somebody/else
tags: [gguf]
---
# A model

It says things.
"""


@pytest.fixture
def with_card(tmp_path: Path) -> Callable[..., Path]:
    def save(card: str | bytes) -> Path:
        model = save_tiny_model("llama", tmp_path / "a-model")
        (model / CARD_FILE).write_bytes(card if isinstance(card, bytes) else card.encode())
        return model

    return save


@dataclass(frozen=True)
class Card:
    """A card as the hub's own client reads it."""

    data: dict[str, Any]
    text: str


def card_of(folder: Path) -> Card:
    found = ModelCard((folder / CARD_FILE).read_text(encoding="utf-8"))
    return Card(found.data.to_dict(), found.text)  # type: ignore[no-untyped-call]


def test_the_card_names_what_the_hub_filters_by(prune: Any, with_card: Any) -> None:
    found = card_of(prune(with_card(SOURCE)).path).data
    assert found == {
        "license": "other",
        "license_name": "own-licence",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["sparseserve", "2:4", "pruned", "sparse", "packed24"],
    }


def test_a_model_without_a_card_gets_one_that_promises_no_other(prune: Any) -> None:
    folder = prune("llama").path
    assert card_of(folder).data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert SOURCE_CARD_FILE not in (folder / CARD_FILE).read_text()
    assert not (folder / SOURCE_CARD_FILE).exists()


@pytest.mark.parametrize(("trained", "relation"), [(False, "quantized"), (True, "finetune")])
def test_a_model_of_the_hub_is_named_as_the_base(prune: Any, trained: bool, relation: str) -> None:
    artifact = prune("llama")
    losses = {"loss": 1.0, "cross_entropy": 1.0}
    retraining = {"before": losses, "after": losses, "epochs": [losses], "kept_epoch": 1}
    retraining |= {"trained_parameters": 1, "steps": 1, "seconds": 1.0}
    report = {**artifact.manifest.report, "base_model": "owner/name"}
    report |= {"retraining": retraining} if trained else {}
    finish_checkpoint(artifact.path, replace(artifact.manifest, report=report, files={}))
    found = card_of(artifact.path).data
    assert (found["base_model"], found["base_model_relation"]) == ("owner/name", relation)


def test_the_body_says_what_was_done_and_what_stays_dense(
    prune: Any, with_card: Any, quick: Any
) -> None:
    recipe = replace(quick, ignore=("down_proj",), reconstruction=Reconstruction(epochs=1))
    artifact = prune(with_card(SOURCE), recipe=recipe)
    text = card_of(artifact.path).text
    assert "| method | wanda |" in text
    assert "calibration.txt: 3 windows of 16 tokens, seed 1" in text
    assert "2 modules: `model.layers.0.mlp.down_proj`" in text
    assert f"{artifact.weight_bytes / 2**20:,.1f} MiB" in text
    assert f"[{SOURCE_CARD_FILE}]({SOURCE_CARD_FILE})" in text
    assert str(artifact.path.parent) not in text


def test_the_sources_card_keeps_its_bytes_through_every_export(
    prune: Any, with_card: Any, tmp_path: Path
) -> None:
    data = SOURCE.replace("\n", "\r\n").encode() + b"\xc3\xa4 without an end of line"
    model = with_card(data)
    packed = prune(model)
    folders = [packed.path]
    for name in ("dense", "semi_structured", "packed24"):
        (folders[-1] / CARD_FILE).write_text("edited")
        folders.append(export(folders[-1], tmp_path / f"as-{name}", name).path)
        assert card_of(folders[-1]).data["license"] == "other"
        assert verify(folders[-1]).manifest.files[SOURCE_CARD_FILE].bytes == len(data)
    for folder in folders:
        assert (folder / SOURCE_CARD_FILE).read_bytes() == data
        assert [path.name for path in folder.glob("*README*.md*")].count(SOURCE_CARD_FILE) == 1


def test_a_dense_export_packed_again_has_the_card_it_had(prune: Any, tmp_path: Path) -> None:
    packed = prune("llama").path
    dense = export(packed, tmp_path / "dense", "dense").path
    again = export(dense, tmp_path / "again", "packed24").path
    assert (again / CARD_FILE).read_bytes() == (packed / CARD_FILE).read_bytes()
    assert (dense / CARD_FILE).read_bytes() != (packed / CARD_FILE).read_bytes()


def test_an_edited_or_removed_card_is_no_damage(prune: Any, tmp_path: Path) -> None:
    folder = prune("llama").path
    assert CARD_FILE not in Artifact.open(folder).manifest.files
    (folder / CARD_FILE).write_text("# My own words")
    verify(folder)
    (folder / CARD_FILE).unlink()
    verify(folder)
    assert (export(folder, tmp_path / "copy", "packed24").path / CARD_FILE).exists()


BROKEN: dict[str, str | bytes] = {
    "no YAML": "---\nlicense: [\n---\n",
    "no mapping": "---\n- license\n---\n",
    "no text": b"---\nlicense: \xff\xfe\n---\n",
    "deep": "---\na: " + "[" * 500 + "\n---\n",
    "long": "---\nlicense: mit\n---\n" + "x" * 2**20,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_card_that_cannot_be_read_has_no_metadata_but_a_problem(
    tmp_path: Path, kind: str
) -> None:
    card, path = BROKEN[kind], tmp_path / "card.md"
    path.write_bytes(card if isinstance(card, bytes) else card.encode())
    found = read_source_card(path)
    assert found.there
    assert found.metadata == {}
    assert found.problem
    assert "\n" not in found.problem


def test_a_card_that_cannot_be_read_stops_no_run(prune: Any, with_card: Any) -> None:
    folder = prune(with_card(BROKEN["no YAML"])).path
    card = card_of(folder)
    assert "license" not in card.data
    assert "Its metadata could not be read (" in card.text
    assert (folder / SOURCE_CARD_FILE).exists()


def test_values_of_other_types_are_not_carried_over(prune: Any, with_card: Any) -> None:
    source = "---\nlicense: {a: b}\nlanguage: [en, 3]\npipeline_tag: [x]\nlicense_name: ''\n---\n"
    found = card_of(prune(with_card(source)).path).data
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    assert found["pipeline_tag"] == "text-generation"


def test_values_that_do_not_print_are_not_carried_over(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text('---\nlicense: "\\ud800"\nlanguage: "a\\u202eb"\n---\n')
    found = read_source_card(tmp_path / "card.md")
    assert (found.metadata, found.problem) == ({}, None)


def test_names_from_outside_cannot_write_markdown(prune: Any) -> None:
    artifact = prune("llama")
    report = {**artifact.manifest.report, "dense_modules": ["a`b\n# heading", "<b>|"]}
    calibration = {**artifact.manifest.calibration, "name": "[x](http://y) | *z* <script>"}
    manifest = replace(artifact.manifest, source="a/`x`\n---", report=report, files={})
    card = model_card(Artifact(artifact.path, replace(manifest, calibration=calibration)))
    assert "\n# heading" not in card
    assert r"\[x\](http://y) \| \*z\* \<script>" in card
    assert r"# \`x\`\\n---, pruned to 2:4" in card


def test_what_a_budget_measured_is_in_the_card(llama: Path, tmp_path: Path, quick: Any) -> None:
    few = HeldOutSpec(sensitivity_windows=2, validation_windows=4)
    out = tmp_path / "out"
    goal = KeepDenseFraction(0.4)
    _, report = prune_within_budget(Job(str(llama), quick), out, goal, held_out=few)
    text = card_of(out).text
    for item in report.chosen.measured:
        assert f"| {item.dense_perplexity:.2f} | {item.perplexity:.2f} |" in text
    assert "a budget was set" in text


@pytest.mark.parametrize("name", FORMATS)
def test_the_commands_of_a_card_are_commands_there_are(name: str) -> None:
    uses = uses_of(name, "2:4", "MY FOLDER")
    assert "vLLM" in {use.title for use in uses}
    lines = [line for use in uses if use.language == "sh" for line in use.code.splitlines()]
    for words in (shlex.split(line) for line in lines):
        if words[0] == "sparseserve":
            command = commands.commands[words[1]]
            command.make_context(words[1], [*words[2:]], resilient_parsing=False)
    for use in uses_of(name, "2:4", 'A "QUOTED" FOLDER'):
        if use.language == "python":
            compile(use.code, "card", "exec")


def test_the_manifest_is_the_only_other_file_without_a_hash(prune: Any) -> None:
    artifact = prune("llama")
    names = {path.name for path in artifact.path.iterdir()}
    assert names - set(artifact.manifest.files) == {CARD_FILE, MANIFEST_FILE}
    assert not re.search(r"\d{4}-\d\d-\d\d", (artifact.path / CARD_FILE).read_text())


@pytest.mark.parametrize(("source", "below"), [(".", ""), ("..", "inside")])
def test_a_folder_that_is_named_by_dots_has_its_own_name_in_the_card(
    prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, below: str
) -> None:
    model = save_tiny_model("llama", tmp_path / "a-model")
    (model / "inside").mkdir()
    monkeypatch.chdir(model / below)
    artifact = prune(Path(source))
    assert "# a-model, pruned to 2:4" in card_of(artifact.path).text
    assert artifact.manifest.source == source
