"""The page about a checkpoint, top to bottom."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparseserve.checkpoint.artifact import Artifact
from sparseserve.checkpoint.summary import DenseGroup, Summary, summarise
from sparseserve.checkpoint.tensors import Checkpoint, writing_whole
from sparseserve.checkpoint.uses import uses_of
from sparseserve.errors import ArtifactError, RecipeError
from sparseserve.page.benches import Bench, read_bench
from sparseserve.page.evaluations import Row, Sides, read_evaluations, rows_of
from sparseserve.page.loss import loss_section
from sparseserve.page.markup import Content, Html, element, folded, joined, table
from sparseserve.page.measured import (
    mebibytes,
    perplexity_section,
    size_section,
    speed_section,
    tasks_section,
)
from sparseserve.page.style import STYLE

# Even a page with a mistake in it could load nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSources:
    """What a page is made from.

    Attributes:
        checkpoint: A folder of ours.
        baseline: The dense model, to compare sizes with; None compares none.
        evaluations: Files of ``sparseserve evaluate --json``.
        benches: Files of ``sparseserve bench --json``.
    """

    checkpoint: Path
    baseline: Path | None = None
    evaluations: tuple[Path, ...] = ()
    benches: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """All that the page shows."""

    artifact: Artifact
    summary: Summary
    weight_bytes: int
    dense_bytes: int | None
    perplexities: tuple[Row, ...]
    scores: tuple[Row, ...]
    benches: tuple[Bench, ...]


def write_page(path: Path, sources: PageSources) -> int:
    """Write the page, whole or not at all, over an earlier one.

    Returns:
        Its size in bytes.

    Raises:
        ArtifactError: The checkpoint or the baseline is damaged, or the disk is full.
        RecipeError: ``path`` does not end in .html, or a file of results is none or does not fit.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(f"-o {path}: must end in .html, so that no other file is written over")
    data = page(read_facts(sources)).encode()
    with writing_whole(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
    return len(data)


def read_facts(sources: PageSources) -> PageFacts:
    """Read what the page shows.

    Raises:
        ArtifactError: The checkpoint or the baseline is damaged.
        RecipeError: A file of results is missing, none, or of another checkpoint.
    """
    artifact = Artifact.open(sources.checkpoint)
    size = artifact.weight_bytes
    sides = Sides(sources.checkpoint, sources.baseline, artifact.manifest.source)
    found = read_evaluations(sources.evaluations)
    return PageFacts(
        artifact=artifact,
        summary=summarise(artifact.manifest),
        weight_bytes=size,
        dense_bytes=_dense_bytes(sources.baseline),
        perplexities=rows_of(found.perplexities, sides),
        scores=rows_of(found.scores, sides),
        benches=tuple(read_bench(file, size) for file in sources.benches),
    )


def page(facts: PageFacts) -> str:
    """Return the page."""
    manifest = facts.artifact.manifest
    title = f"{facts.summary.base}, pruned to {manifest.pattern}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    main = element(
        "main",
        element("h1", title),
        element(
            "p",
            f"Report of sparseserve on {facts.artifact.path}, stored as {manifest.format}",
            class_="faint",
        ),
        _tiles(facts),
        *(_section(name, content) for name, content in _sections(facts)),
    )
    return "<!doctype html>\n" + element("html", head, element("body", main), lang="en").text + "\n"


def _sections(facts: PageFacts) -> Iterator[tuple[str, Html]]:
    summary, folder = facts.summary, shlex.quote(str(facts.artifact.path))
    yield "What was done", _done(summary)
    yield (
        "Perplexity",
        perplexity_section(summary.measured, facts.perplexities, facts.benches, folder),
    )
    if facts.scores:
        yield "Tasks", tasks_section(facts.scores)
    yield "Speed", speed_section(facts.benches, folder)
    yield "Size", size_section(facts.weight_bytes, facts.dense_bytes, facts.benches)
    if summary.report and summary.report.operators:
        yield "Loss by operator and layer", loss_section(summary.report)
    yield "What stays dense", element("ul", *map(_dense_group, summary.dense))
    yield "How to use it", _uses(facts.artifact)


def _section(title: str, content: Html) -> Html:
    return element("section", element("h2", title), content)


def _tiles(facts: PageFacts) -> Html:
    tiles = [_tile(name, value, note) for name, value, note in _headlines(facts)]
    return element("dl", *tiles, class_="tiles")


def _tile(name: str, value: str, note: str) -> Html:
    small = element("dd", note, class_="small")
    return element("div", element("dt", name), element("dd", value), small)


def _headlines(facts: PageFacts) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and note of what matters most, as far as it is known."""
    yield "pruned", f"{len(facts.artifact.manifest.pruned):,}", "linear operators"
    dense = facts.dense_bytes or (facts.benches[0].dense.weight_bytes if facts.benches else None)
    against = f"{facts.weight_bytes / dense:.1%} of the dense model's" if dense else "of weights"
    yield "on disk", mebibytes(facts.weight_bytes), against
    if found := next(_perplexities(facts), None):
        text, dense_perplexity, perplexity = found
        yield "perplexity", f"{perplexity:,.2f}", f"{dense_perplexity:,.2f} dense; {text}"
    if facts.benches and facts.benches[0].speeds:
        first = facts.benches[0].speeds[0]
        note = f"dense speed when writing, batch {first.batch_size}"
        yield "speed", f"{first.decode:.2f}x", note


def _perplexities(facts: PageFacts) -> Iterator[tuple[str, float, float]]:
    """Yield text, dense and pruned perplexity, the run's own first."""
    for item in facts.summary.measured:
        yield item.text, item.dense_perplexity, item.perplexity
    for row in facts.perplexities:
        if row.dense and row.pruned:
            yield row.any.subject, row.dense.value, row.pruned.value
    for bench in facts.benches:
        yield "text of the bench", bench.dense.perplexity, bench.pruned.perplexity


def _done(summary: Summary) -> Html:
    rows: list[tuple[Content, ...]] = [(fact.name, fact.value) for fact in summary.steps]
    if report := summary.report:
        here = report.environment
        versions = f"sparseserve {here.sparseserve}, torch {here.torch}"
        rows += [
            ("time", f"{report.seconds:,.0f} s on {here.machine}"),
            ("most memory", f"{report.peak_memory_bytes / 2**30:,.1f} GiB"),
            ("software", f"{versions}, transformers {here.transformers}, Python {here.python}"),
        ]
    return table("Steps, in their order", ("step", "how"), rows, numbers=2)


def _dense_group(group: DenseGroup) -> Html:
    if not group.names:
        return element("li", group.reason)
    names = element("p", *(part for name in group.names for part in (element("code", name), " ")))
    count = f"{len(group.names):,} {'module' if len(group.names) == 1 else 'modules'}"
    return element("li", f"{count}: {group.reason}", folded("Their names", names))


def _uses(artifact: Artifact) -> Html:
    manifest = artifact.manifest
    parts: list[Html] = []
    for use in uses_of(manifest.format, manifest.pattern, str(artifact.path)):
        note = element("p", use.note.replace("`", ""))
        parts += [element("h3", use.title), note, element("pre", use.code)]
    return joined(parts)


def _dense_bytes(baseline: Path | None) -> int | None:
    if baseline is None:
        return None
    if not baseline.is_dir():
        raise ArtifactError(f"--baseline {baseline}: no such folder: give that of the dense model")
    return Checkpoint.open(baseline).weight_bytes
