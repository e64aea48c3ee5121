"""The model card: a README.md with the hub's metadata, in every folder that is written.

The card follows from the manifest, the size of the weights and the metadata of the source's own
card, so equal runs write equal cards. The source's README.md is kept byte for byte as
SOURCE_README.md, and a checkpoint that is exported again hands that file on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from sparseserve.checkpoint.artifact import CARD_FILE, Artifact, Manifest, write_manifest
from sparseserve.checkpoint.summary import Summary, summarise
from sparseserve.checkpoint.tensors import writing_whole
from sparseserve.checkpoint.uses import uses_of
from sparseserve.errors import first_line, printable
from sparseserve.exporters.side_files import SOURCE_CARD_FILE

_FOLDER = "FOLDER"
_LARGEST_CARD = 2**20  # bytes; YAML of that size takes seconds
_LONGEST_VALUE = 500
# What the hub filters models by and what stays true of a pruned model.
_CARRIED = ("license", "license_name", "license_link", "language")
_LIBRARIES = {"onnx": "onnx", "tensorrt": None}
_NAMED = 3
# What Markdown takes for markup; an underscore within a word is none.
_MARKS = re.compile(r"[\\`*\[\]<|&$~]|(?<!\w)_|_(?!\w)")


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What the card of the pruned model says of itself.

    Attributes:
        there: Whether there is one.
        metadata: Its metadata, as far as it is used here: texts and lists of texts.
        problem: Why its metadata could not be read; None if it could.
    """

    there: bool
    metadata: Mapping[str, Any]
    problem: str | None = None


def finish_checkpoint(folder: Path, manifest: Manifest) -> Artifact:
    """Write the manifest of a complete ``folder``, and its model card.

    Raises:
        ArtifactError: The disk is full, or the manifest's report is not one of ours.
    """
    artifact = write_manifest(folder, manifest)
    card = model_card(artifact)
    with writing_whole(folder / CARD_FILE) as partial:
        partial.write_text(card, encoding="utf-8", newline="\n")
    return artifact


def model_card(artifact: Artifact) -> str:
    """Return the card of a checkpoint.

    Raises:
        ArtifactError: The manifest's recipe or report is not one of ours.
    """
    summary = summarise(artifact.manifest)
    source = read_source_card(artifact.path / SOURCE_CARD_FILE)
    metadata = _metadata(artifact.manifest, summary, source).to_yaml(line_break="\n")
    body = "\n".join(_body(artifact, summary, source))
    return f"---\n{metadata}\n---\n\n{body}\n"


def read_source_card(path: Path) -> SourceCard:
    """Read the metadata that is carried over from the card of the pruned model.

    Anybody's card can be there. One that cannot be read costs its metadata and no run: the new card
    says so.
    """
    if not path.is_file():
        return SourceCard(False, {})
    if (size := path.stat().st_size) > _LARGEST_CARD:
        return SourceCard(True, {}, f"it has {size:,} bytes, more than {_LARGEST_CARD:,}")
    try:
        found = metadata_load(path) or {}
    except Exception as error:  # whatever a YAML parser raises for a file of anybody's
        return SourceCard(True, {}, printable(first_line(error)))
    wanted = (*_CARRIED, "pipeline_tag")
    return SourceCard(True, {key: found[key] for key in wanted if _is_plain(found.get(key))})


def _is_plain(value: object) -> bool:
    """Whether it is a short text that prints, or a list of such."""
    items = value if isinstance(value, list) else [value]
    return 0 < len(items) <= _LONGEST_VALUE and all(
        isinstance(item, str) and 0 < len(item) <= _LONGEST_VALUE and item.isprintable()
        for item in items
    )


def _metadata(manifest: Manifest, summary: Summary, source: SourceCard) -> ModelCardData:
    carried = dict(source.metadata)
    task = carried.pop("pipeline_tag", None)
    pattern = manifest.pattern if ":" in manifest.pattern else "unstructured"
    stored_as = [] if manifest.format == "dense" else [manifest.format]
    relation = "finetune" if summary.trained else "quantized"
    return ModelCardData(
        base_model=summary.hub_name,
        base_model_relation=relation if summary.hub_name else None,
        library_name=_LIBRARIES.get(manifest.format, "transformers"),
        pipeline_tag=task if isinstance(task, str) else "text-generation",
        tags=["sparseserve", pattern, "pruned", "sparse", *stored_as],
        **carried,
    )


def _body(artifact: Artifact, summary: Summary, source: SourceCard) -> Iterator[str]:
    manifest = artifact.manifest
    size = f"{artifact.weight_bytes / 2**20:,.1f} MiB"
    yield f"# {_text(summary.base)}, pruned to {_text(manifest.pattern)}"
    yield ""
    yield (
        f"This is `{_code(summary.base)}`, pruned to {_text(manifest.pattern)} sparsity with "
        f"sparseserve and stored as `{manifest.format}`. Its weights take {size} on disk."
    )
    if source.there:
        yield ""
        yield (
            f"What the model is for and what its limits are: [{SOURCE_CARD_FILE}]"
            f"({SOURCE_CARD_FILE}), the card of the model before it was pruned."
        )
    if source.problem:
        yield (
            f"Its metadata could not be read ({_text(source.problem)}), so licence and language "
            "are not named here."
        )
    yield from _section("What was done", _table(summary))
    yield from _section("What stays dense", _dense(summary))
    yield from _section("Loss", _loss(summary))
    yield from _section("How to use it", _uses(manifest))


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    yield from lines


def _table(summary: Summary) -> Iterator[str]:
    yield from ("| step | how |", "|---|---|")
    for fact in summary.steps:
        yield f"| {_text(fact.name)} | {_text(fact.value)} |"
    yield from ("", "`sparseserve.json` holds the whole recipe and the result of each operator.")


def _dense(summary: Summary) -> Iterator[str]:
    for group in summary.dense:
        first = ", ".join(f"`{_code(name)}`" for name in group.names[:_NAMED])
        more = len(group.names) - _NAMED
        rest = f" and {more:,} more" if more > 0 else ""
        named = f"{len(group.names):,} modules: {first}{rest}. Reason: " if first else ""
        yield f"- {named}{_text(group.reason)}"


def _loss(summary: Summary) -> Iterator[str]:
    if not summary.measured:
        yield (
            "Perplexity was not measured while the model was pruned. `sparseserve evaluate` "
            "measures it on your text, for this checkpoint and for the dense model."
        )
        return
    yield from ("| text | dense perplexity | perplexity | gap |", "|---|---|---|---|")
    for item in summary.measured:
        perplexities = f"{item.dense_perplexity:.2f} | {item.perplexity:.2f}"
        yield f"| {_text(item.text)} | {perplexities} | {item.gap:.4f} |"
    yield from ("", "The gap is ln(perplexity / dense perplexity), on windows pruning did not see.")


def _uses(manifest: Manifest) -> Iterator[str]:
    yield f"`{_FOLDER}` is the folder of this file, or its name on the hub."
    for use in uses_of(manifest.format, manifest.pattern, _FOLDER):
        yield from ("", f"**{use.title}.** {use.note}", "")
        yield from (f"```{use.language}", use.code, "```")


def _text(value: str) -> str:
    """Return ``value`` in one line that Markdown shows as it is, also inside of a table."""
    return _MARKS.sub(r"\\\g<0>", printable(value))


def _code(value: str) -> str:
    """Return ``value`` as it can stand between backticks."""
    return printable(value).replace("`", "'").replace("|", "¦")
