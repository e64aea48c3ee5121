"""``sparseserve report``: what the page says, and that it asks for nothing from anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.checkpoint.summary import summarise
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.page.build import PageSources, page, read_facts, write_page
from sparseserve.recipe.settings import PruneRecipe
from sparseserve.recipe.steps import Reconstruction
from sparseserve.report import PruneReport
from sparseserve.testing import save_tiny_model
from sparseserve.workflow.job import Job
from sparseserve.workflow.run import prune_and_export
from tests.integration.command_line import Cli, refusal

ADDRESSES = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}
VOID = {"meta"}


class Page(HTMLParser):
    """A page as a browser reads it; an element that is not closed, or closed twice, is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells.append(data)


def assert_asks_for_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
        assert not ADDRESSES & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text.lower()
    assert "@import" not in page.text
    assert not re.search(r"(?<!\w)(https?:)?//\w", page.text)


def page_of(folder: Path, path: Path, **sources: Any) -> Page:
    write_page(path, PageSources(checkpoint=folder, **sources))
    return Page(path)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, quick: PruneRecipe) -> Artifact:
    """Read by all tests and changed by none."""
    folder = tmp_path_factory.mktemp("report")
    recipe = replace(quick, ignore=("layers.1.mlp",), reconstruction=Reconstruction(epochs=1))
    job = Job(str(save_tiny_model("llama", folder / "llama")), recipe)
    return prune_and_export(job, folder / "out")


def write_changed(artifact: Artifact, path: Path, **changes: Any) -> Page:
    """Write the page of an artifact whose manifest says something else."""
    facts = read_facts(PageSources(checkpoint=artifact.path))
    manifest = replace(artifact.manifest, **changes)
    changed = replace(facts, artifact=replace(artifact, manifest=manifest))
    text = page(replace(changed, summary=summarise(manifest)))
    path.write_text(text, encoding="utf-8")
    return Page(path)


def test_the_page_shows_every_error_and_every_dense_module(
    pruned: Artifact, tmp_path: Path
) -> None:
    found = page_of(pruned.path, tmp_path / "page.html")
    assert_asks_for_nothing(found)
    report = PruneReport.from_json(pruned.manifest.report)
    for operator in report.operators:
        assert f"{operator.relative_error:.4f}" in found.cells
    for layer in report.layers:
        assert layer.reconstruction is not None
        assert f"{layer.reconstruction.error_after:.4f}" in found.cells
    assert set(report.dense_modules) <= set(found.words)
    tips = [word for word in found.words if ", self_attn.q_proj: " in word]
    assert [tip.split(",")[0] for tip in tips] == ["model.layers.0", "model.layers.1"]
    assert f"sparseserve serve {pruned.path}" in found.words


def test_equal_inputs_make_equal_pages_and_replace_an_earlier_one(
    pruned: Artifact, tmp_path: Path
) -> None:
    first = page_of(pruned.path, tmp_path / "a.html").text
    (tmp_path / "b.html").write_text("old")
    assert page_of(pruned.path, tmp_path / "b.html").text == first
    assert not list(tmp_path.glob("*.tmp"))


def test_real_evaluations_and_the_dense_size_are_compared(
    prune: Any, cli: Cli, tmp_path: Path
) -> None:
    folder = prune("llama").path
    text = tmp_path / "held-out.txt"
    text.write_text("\n\n".join(f"Other line {i} of {i * 7 % 31} words." for i in range(60)))
    arguments = ["--text", text, "--sequence-length", 32, "--json"]
    perplexities = {}
    for name in ("out", "model-llama"):
        done = cli("evaluate", name, *arguments)
        (tmp_path / f"{name}.json").write_text(done.stdout)
        perplexities[name] = json.loads(done.stdout)["perplexity"]
    given = ["--evaluation", "out.json", "--evaluation", "model-llama.json"]
    done = cli("report", "out", "--baseline", "model-llama", *given, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = Page(tmp_path / told["output"])
    assert told == {"output": "out-report.html", "bytes": len(found.text.encode())}
    assert_asks_for_nothing(found)
    start = found.cells.index("held-out.txt")
    assert found.cells[start + 2 : start + 4] == [
        f"{perplexities[name]:,.2f}" for name in ("model-llama", "out")
    ]
    dense = sum(path.stat().st_size for path in (tmp_path / "model-llama").glob("*.safetensors"))
    ratio = Artifact.open(folder).weight_bytes / dense
    assert f"{ratio:.3f}" in found.cells


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_pattern_has_a_page(pruned: Artifact, tmp_path: Path, name: str) -> None:
    for pattern in ("2:4", "4:8", "50%"):
        found = write_changed(pruned, tmp_path / "page.html", format=name, pattern=pattern)
        assert_asks_for_nothing(found)
        assert f"llama, pruned to {pattern}" in found.words


HOSTILE = "</style></title><script src=//x.org>\"'&\u202e\ud800"


def hostile(value: object) -> object:
    """Return JSON data with every text in it replaced, and every key kept."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    return value


def test_no_text_of_a_manifest_becomes_markup(pruned: Artifact, tmp_path: Path) -> None:
    manifest = pruned.manifest
    reasons = dict.fromkeys(manifest.report["dense_modules"], "x")
    found = write_changed(
        pruned,
        tmp_path / "page.html",
        source=HOSTILE,
        report=hostile({**manifest.report, "dense_reasons": reasons}),
        recipe={**manifest.recipe, "method": hostile(manifest.recipe["method"])},
        calibration=hostile(manifest.calibration),
    )
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(ADDRESSES & attributes.keys() for _, attributes in found.tags)
    assert "\u202e" not in found.text


@pytest.mark.parametrize(
    "report",
    [
        {"layers": 3},
        {"layers": [{"name": 1, "operators": [], "seconds": 1}]},
        {"budget": {"chosen": {"measured": [{"text": "a"}]}}},
        {"budget": []},
        {"converted": {"formats": 3}},
    ],
)
def test_a_report_that_is_none_of_ours_is_one_line(
    pruned: Artifact, tmp_path: Path, report: dict[str, Any]
) -> None:
    changed = {**pruned.manifest.report, **report}
    with pytest.raises(ArtifactError, match="is not as sparseserve writes it") as caught:
        write_changed(pruned, tmp_path / "page.html", report=changed)
    assert "\n" not in str(caught.value)


def test_only_pages_are_written_over(pruned: Artifact, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"must end in \.html"):
        page_of(pruned.path, pruned.path / "config.json")


def test_wrong_folders_and_files_are_refused_in_one_line(pruned: Artifact, cli: Cli) -> None:
    out = pruned.path
    assert "no such folder" in refusal(cli("report", "absent"))
    assert "has no sparseserve.json" in refusal(cli("report", out.parent / "llama"))
    for option, message in (
        ("--baseline", "--baseline absent: no such folder"),
        ("--bench", "absent: no such file"),
        ("--evaluation", "absent: no such file"),
    ):
        assert message in refusal(cli("report", out, option, "absent"))
