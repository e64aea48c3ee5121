"""Which families can be pruned, and what do other programs make of the result?

A tiny random model of every language model that transformers knows, and of every multimodal model
around one, is pruned to 2:4 and exported. ``pruned`` says that the checkpoint was verified and that
plain transformers computes the same from its packed and its dense form. With ``--serve``, vLLM
serves both forms too. Tiny models show what the code can do with a family; they say nothing about
quality. ::

    python -m benchmarks.families.sweep [FAMILY ...] [--serve]
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from benchmarks.families.served import Served, serve
from benchmarks.families.tiny_configurations import tiny_configuration
from benchmarks.harness.markdown import head, line
from benchmarks.harness.results import RESULTS, Result, read_result, write_result
from sparseserve import Job, export, prune_and_export, verify
from sparseserve.errors import SparseServeError, first_line
from sparseserve.pruners.wanda import Wanda
from sparseserve.recipe.toml import UNTRAINED
from sparseserve.testing import tiny_tokenizer
from sparseserve.text.calibration import CalibrationSpec

FAMILIES = tuple(
    sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
)
TEXT = "\n\n".join(f"Line {i}: the {i * i % 97} quick brown foxes jump over it." for i in range(99))
TOKENS = torch.arange(10, 26)[None]
# No tiny configuration is larger; defaults that are not sizes make some models so.
MOST_PARAMETERS = 8_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a family.

    Attributes:
        family: transformers' name of it.
        outcome: ``pruned``, ``refused``, or ``not tried`` where no tiny model of it can be built.
        operators: How many linears were pruned.
        of_experts: How many of them belong to experts.
        dense: How many linears stay dense, by reason.
        reason: Why it is refused or not tried.
        served: What vLLM did; None where that was not tried.
    """

    family: str
    outcome: str
    operators: int = 0
    of_experts: int = 0
    dense: dict[str, int]
    reason: str = ""
    served: Served | None = None


def tiny_model_of(family: str) -> PreTrainedModel:
    """Return a random model of ``family``.

    Raises:
        Exception: Whatever transformers raises; ValueError if it would be large.
    """
    config = tiny_configuration(family)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(item.numel() for item in _made(kind, config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its smallest model has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = _made(kind, config).eval().requires_grad_(False)
    model(TOKENS, use_cache=False)
    return model


def _made(kind: type[Any], config: PretrainedConfig) -> PreTrainedModel:
    made: PreTrainedModel = kind.from_config(config)
    return made


def try_family(family: str, place: Path) -> Outcome:
    """Prune ``family`` and export it into ``place / "packed"`` and ``place / "dense"``."""
    try:
        model = tiny_model_of(family)
    except Exception as error:  # whatever a model's code raises on sizes that it does not expect
        return Outcome(family=family, outcome="not tried", dense={}, reason=first_line(error))
    (place / "text.txt").write_text(TEXT)
    model.save_pretrained(place / "source")
    tiny_tokenizer().save_pretrained(place / "source")
    recipe = replace(
        UNTRAINED,
        pruner=Wanda(),
        calibration=CalibrationSpec(
            source=str(place / "text.txt"), samples=3, sequence_length=16, seed=1, scrambled=0
        ),
    )
    try:
        artifact = prune_and_export(Job(str(place / "source"), recipe), place / "packed")
        export(artifact.path, place / "dense", "dense")
        verify(place / "packed")
    except SparseServeError as error:
        reason = str(error).replace(f"{place}/", "").removeprefix("source: ")
        return Outcome(family=family, outcome="refused", dense={}, reason=reason)
    packed, dense = (_logits(place / form, type(model)) for form in ("packed", "dense"))
    # The weights are the same; how they lie in memory may move the last digit.
    if not torch.allclose(packed, dense, rtol=1e-5, atol=1e-5):
        raise AssertionError(f"{family}: transformers computes another thing from the packed form")
    report = artifact.manifest.report
    operators = [item for layer in report["layers"] for item in layer["operators"]]
    return Outcome(
        family=family,
        outcome="pruned",
        operators=len(operators),
        of_experts=sum(item["tokens"] is not None for item in operators),
        dense=dict(Counter(map(_without_numbers, report["dense_reasons"].values()))),
    )


def _logits(folder: Path, kind: type[PreTrainedModel]) -> torch.Tensor:
    with torch.no_grad():
        model = kind.from_pretrained(folder).eval()
        logits: torch.Tensor = model(TOKENS, use_cache=False).logits
    return logits


def _without_numbers(reason: str) -> str:
    """Return one text for all reasons that differ in sizes and names alone."""
    if reason.startswith("sees"):
        return "sees other rows than the tokens"
    if reason.endswith("too small to gain anything"):
        return "too small to gain anything"
    if reason.startswith("shares"):
        return "shares its weight with another module"
    return reason


def families_table(result: Result) -> str:
    """One line for each family that was tried, refused ones last."""
    rows = [row for row in result["rows"] if row["outcome"] != "not tried"]
    rows.sort(key=lambda row: (row["outcome"] != "pruned", row["family"]))
    columns = ("pruned linears", "of experts", "stays dense, or why refused", "vLLM")
    lines = [head("family", *columns)]
    for row in rows:
        note = "; ".join(f"{count}: {reason}" for reason, count in row["dense"].items())
        if row["outcome"] == "refused":
            lines.append(line(row["family"], "refused", "", row["reason"], ""))
            continue
        experts = str(row["of_experts"] or "")
        lines.append(line(row["family"], str(row["operators"]), experts, note, _served(row)))
    pruned = sum(row["outcome"] == "pruned" for row in rows)
    return "\n".join([*lines, f"\n{pruned} of {len(rows)} families that were tried are pruned."])


def _served(row: dict[str, Any]) -> str:
    return "" if row["served"] is None else Served(**row["served"]).short


@click.command()
@click.argument("families", nargs=-1)
@click.option("--serve", "serving", is_flag=True, help="Let vLLM serve what was pruned, too.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=RESULTS / "families.json")
def main(families: tuple[str, ...], serving: bool, output: Path) -> None:
    quiet()
    known = {row["family"]: row for row in _known(output)}
    place = Path(tempfile.mkdtemp(prefix="families-"))
    try:
        for outcome in outcomes(families or FAMILIES, place, serving=serving):
            served = known.get(outcome.family, {}).get("served")
            known[outcome.family] = asdict(outcome)
            if not serving and outcome.outcome == "pruned":
                known[outcome.family]["served"] = served
            click.echo(f"{outcome.family}: {outcome.outcome} {outcome.reason}")
    finally:
        shutil.rmtree(place)
    rows = [known[family] for family in FAMILIES if family in known]
    write_result(output, {"tokens": 48, "method": "wanda"}, rows=rows)


def outcomes(families: Iterable[str], place: Path, *, serving: bool) -> Iterable[Outcome]:
    """Try ``families``; of those that were pruned, learn what vLLM does with them."""
    found: dict[str, Outcome] = {}
    for family in families:
        (place / family).mkdir()
        found[family] = try_family(family, place / family)
        if not serving:
            shutil.rmtree(place / family)
            yield found[family]
    if serving:
        pruned = [family for family, item in found.items() if item.outcome == "pruned"]
        served = serve({family: place / family for family in pruned})
        for family, item in found.items():
            yield replace(item, served=served.get(family))


def quiet() -> None:
    """Keep the remarks of transformers about random models back."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _known(output: Path) -> list[dict[str, Any]]:
    return list(read_result(output)["rows"]) if output.exists() else []


if __name__ == "__main__":
    main()
