"""Every ``sparseserve`` command that a page shows works, on tiny models and short texts.

A block that needs a GPU, the model hub, several machines or much time is marked by a comment in
the line above it, such as ``<!-- only parsed: GPU -->``. Its options are parsed and nothing runs.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import click
import pytest
from _pytest.mark import ParameterSet

import sparseserve
from sparseserve.cli.main import cli as commands
from sparseserve.recipe.toml import PRESETS
from sparseserve.testing import save_tiny_model
from tests.integration.command_line import Cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Run by `make test-all` only: faster pages show the same, or it has tests of its own.
SLOW = {f"docs/how-to/{page}.md" for page in ("budget", "compare", "evaluate", "serve")}
NEEDS = {"GPU", "hub", "cluster", "long"}

# Given last, they win over what the page says.
TINY: dict[str, tuple[str, ...]] = {
    "prune-and-export": ("--samples", "4", "--sequence-length", "32"),
    "sensitivity": ("--samples", "4", "--sequence-length", "32"),
    "evaluate": ("--samples", "2", "--sequence-length", "32"),
    "bench": (
        *("--samples", "2", "--sequence-length", "32", "--batch-sizes", "1"),
        *("--input-length", "8", "--output-length", "4", "--repeats", "1", "--dtype", "float32"),
    ),
}
TINY_TASKS = ("--limit", "2")
TINY_LOAD = ("--concurrency", "1", "--requests", "2")
ENGINES = {"bench", "tune"}


@dataclass(frozen=True)
class Shown:
    """A command on a page.

    ``need`` says why it is only parsed, if it is; ``into`` is the file that its output goes to.
    """

    page: str
    words: tuple[str, ...]
    need: str | None
    into: str | None = None

    @property
    def name(self) -> str:
        return self.words[0]

    @property
    def kind(self) -> tuple[str, bool]:
        """The command, and whether it starts servers: what tells starts of engines apart."""
        return self.name, "--http" in self.words

    def tiny(self) -> list[str]:
        """Return the arguments at tiny scale; a server's command is printed, not started."""
        if self.name == "serve":
            return ["serve", "--dry-run", *self.words[1:]]
        if "--tasks" in self.words:
            return [*self.words, *TINY_TASKS]
        load = TINY_LOAD if "--http" in self.words else ()
        return [*self.words, *TINY.get(self.name, ()), *load]


def commands_of(page: Path) -> Iterator[Shown]:
    """Yield the commands in fenced and indented blocks, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    fenced, mark, need = False, None, None
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, need, mark = not fenced, mark, None
            continue
        if found := re.match(r"\s*<!-- only parsed: (\w+) -->", line):
            mark = found[1]
        command = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*sparseserve (.*)", line)
        if command and (fenced or line.startswith("    ")):
            words = tuple(shlex.split(command[1], comments=True))
            words, into = (words[:-2], words[-1]) if words[-2:-1] == (">",) else (words, None)
            yield Shown(str(page.relative_to(ROOT)), words, need if fenced else None, into)


SHOWN = [shown for page in PAGES for shown in commands_of(page)]
# Engines take long to start: each use of them is run where it is shown first.
FIRST = {shown.kind: shown.page for shown in reversed(SHOWN)}


def is_run(shown: Shown) -> bool:
    return shown.need is None and (shown.name not in ENGINES or FIRST[shown.kind] == shown.page)


def page_cases() -> list[ParameterSet]:
    cases = []
    for page in dict.fromkeys(shown.page for shown in SHOWN if is_run(shown)):
        vllm = any(s.page == page and s.name in {*ENGINES, "serve"} and is_run(s) for s in SHOWN)
        marks: list[pytest.MarkDecorator] = [pytest.mark.vllm] if vllm else []
        marks += [pytest.mark.further] if page in SLOW else []
        cases.append(pytest.param(page, marks=[*marks, pytest.mark.timeout(900)], id=page))
    return cases


@pytest.fixture
def reader(tmp_path: Path, cli: Cli) -> Path:
    """The folder of a reader, in which the names of the pages are there."""
    save_tiny_model("llama", tmp_path / "MODEL")
    shutil.copytree(tmp_path / "MODEL", tmp_path / "smollm2-135m")
    (tmp_path / "my-texts").mkdir()
    for number, name in enumerate(("my-texts/letters.txt", "held-out.txt", "validation.txt")):
        lines = (f"Sentence {i} of {i * 7 % 31 + number} words in {name}." for i in range(900))
        (tmp_path / name).write_text("\n\n".join(lines))
    (tmp_path / "validation.txt").rename(tmp_path / "like-what-is-served.txt")
    answers = [f"Answer {i} of {i * 7 % 31} words." for i in range(300)]
    for name, rows in (
        ("answers", [{"question": "Why?", "answer": answer} for answer in answers]),
        ("chats", [{"messages": [{"role": "user", "content": answer}]} for answer in answers]),
    ):
        lines = (json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "my-tasks").mkdir()
    choices = {"text": list("abcd"), "label": list("ABCD")}
    for name, row in (
        ("piqa", {"goal": "Sit.", "sol1": "On a chair.", "sol2": "On a wall.", "label": 0}),
        ("openbookqa", {"question_stem": "A is", "choices": choices, "answerKey": "A"}),
    ):
        (tmp_path / "my-tasks" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (tmp_path / "mine.toml").write_text('[method]\nname = "wanda"\n')
    return tmp_path


@pytest.mark.parametrize("page", page_cases())
def test_commands_of_a_page_work_in_their_order(page: str, reader: Path, cli: Cli) -> None:
    shown = [each for each in SHOWN if each.page == page and is_run(each)]
    made = {
        each.words[number + 1]
        for each in shown
        for number, word in enumerate(each.words)
        if word == "-o"
    }
    if "OUT" not in made:
        quick = ("--method", "magnitude", *TINY["prune-and-export"])
        assert cli("prune-and-export", "MODEL", "-o", "OUT", *quick).returncode == 0
    for each in shown:
        if each.name in ENGINES:
            pytest.importorskip("vllm")
            command = [sys.executable, "-m", "sparseserve", *each.tiny()]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, (each, ended.stderr[-2000:])
        else:
            done = cli(*each.tiny())
            assert done.returncode == 0, (each, done.stderr[-2000:])
            if each.into:
                (reader / each.into).write_text(done.stdout)


@pytest.mark.parametrize("shown", [s for s in SHOWN if not s.name.startswith("-")], ids=str)
def test_options_of_every_command_are_parsed(shown: Shown) -> None:
    assert shown.need is None or shown.need in NEEDS
    command = commands.commands[shown.name]
    with command.make_context(shown.name, list(shown.words[1:])):
        pass  # a wrong option or a missing argument is a UsageError


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_named_in_sentences_and_their_options_exist(page: Path) -> None:
    for span in re.findall(r"`sparseserve ([^`\n]+)`", page.read_text(encoding="utf-8")):
        name, *words = shlex.split(span.split(" -- ")[0])
        known = {option for p in commands.commands[name].params for option in p.opts}
        assert {word for word in words if word.startswith("-")} <= known, span


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_examples_use_names_that_exist(page: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    imported = (re.findall(r"from sparseserve import (.+)", block) for block in blocks)
    names = {name.strip() for line in chain(*imported) for name in line.split(",")}
    names |= {name for block in blocks for name in re.findall(r"\bsparseserve\.(\w+)", block)}
    assert names <= set(sparseserve.__all__)


def test_recipes_named_in_pages_exist() -> None:
    named = {
        each.words[each.words.index("--recipe") + 1] for each in SHOWN if "--recipe" in each.words
    }
    assert {name for name in named if not name.endswith(".toml")} <= PRESETS.keys()


def test_a_wrong_option_on_a_page_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        commands.commands["verify"].make_context("verify", ["OUT", "--no-such-option"])


def test_commands_are_found_in_every_kind_of_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "    $ sparseserve verify A\n\nsparseserve is a word\n\n"
        "```sh\nX=1 sparseserve tune B  # why\nsparseserve serve C -- \\\n  --port 1\n```\n\n"
        "<!-- only parsed: GPU -->\n```sh\nsparseserve verify D\n```\n"
        "\n```sh\nsparseserve verify E --json > e.json\n```\n"
    )
    found = [(shown.words, shown.need) for shown in commands_of(page)]
    assert [shown.into for shown in commands_of(page)] == [None] * 4 + ["e.json"]
    assert found == [
        (("verify", "A"), None),
        (("tune", "B"), None),
        (("serve", "C", "--", "--port", "1"), None),
        (("verify", "D"), "GPU"),
        (("verify", "E", "--json"), None),
    ]


def test_the_reference_holds_the_module_of_every_public_name() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    objects = (getattr(sparseserve, name) for name in sparseserve.__all__ if name[0] != "_")
    assert {each.__module__ for each in objects} <= listed


def test_every_page_has_a_place_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages
