"""What the documents say is what the code and the committed results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.demo.readme_commands import RESULT, shown_commands
from benchmarks.harness.results import read_result
from benchmarks.harness.tables import PAGES, TABLES, render, result_file
from sparseserve.checkpoint.formats import FORMATS
from sparseserve.cli.main import cli
from sparseserve.foreign.source import FORMATS as FOREIGN

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_every_table_is_what_its_result_says(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render(text) == text


def test_every_table_has_a_committed_result_and_a_place() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for name in TABLES:
        assert result_file(name).exists()
        assert f"<!-- table: {name} -->" in pages


def test_the_page_of_formats_has_a_line_for_each_that_is_written_or_read() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    written, read = page.split("## Checkpoints of other tools")
    first = re.findall(r"^\| `([\w-]+)` \|", written, re.MULTILINE)
    assert first[: len(FORMATS)] == list(FORMATS)
    assert re.findall(r"^\| `([\w-]+)` \|", read, re.MULTILINE) == [row.name for row in FOREIGN]


def test_the_readme_shows_what_its_commands_printed() -> None:
    shown = shown_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    printed = read_result(RESULT)["commands"]
    assert [each.command for each in shown] == [each["command"] for each in printed]
    for each, found in zip(shown, printed, strict=True):
        rest = " ".join(" ".join(found["output"]).split())
        for part in " ... ".join(each.output).split("..."):
            words = " ".join(part.split())
            assert words in rest, f"{each.command}: {words}"
            rest = rest.partition(words)[2] if words else rest


def test_every_option_in_the_readme_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    used = {
        option
        for line in re.findall(r"^\s*(?:\$ )?sparseserve (.*)$", readme, re.MULTILINE)
        for option in re.findall(r"(?<![\w-])(--[a-z-]+)", line.split(" -- ")[0])
    }
    assert used
    assert used <= known
