"""Is every damaged input either read as its bytes say, or refused in one line?

From a corpus of tiny models, checkpoints, recipes and texts, inputs are made by damaging bytes and
values by chance. Each is read as a command would read it, in a process that may hang or die. What
is accepted is compared with a plain reading of the same bytes. ::

    python -m benchmarks.stress.fuzzed_inputs --inputs 10000
    python -m benchmarks.stress.fuzzed_inputs --only "manifests" --inputs 100 --seed 7
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from benchmarks.harness.markdown import head, line, processor_and_software
from benchmarks.harness.results import RESULTS, Result, write_result
from benchmarks.stress.fuzz_kinds import KINDS, Kind
from benchmarks.stress.guarded import ACCEPTED, FAILED, REFUSED, endings

_SHOWN_FAULTS = 20
_RESULT = RESULTS / "fuzzed-inputs.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of the inputs of one kind.

    Attributes:
        kind: Its name.
        inputs: How many.
        accepted: Those that were read as their bytes say.
        refused: Those that were refused in one line.
        failed: All others.
        faults: What happened to some of those, each with its number.
    """

    kind: str
    inputs: int
    accepted: int
    refused: int
    failed: int
    faults: tuple[str, ...]


def measure(kind: Kind, inputs: int, seed: int, seconds: float) -> Row:
    """Make and try so many inputs of a kind."""
    counts, faults = Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        kind.prepare(Path(scratch))
        for ending in endings(
            kind.attempt, Path(scratch), range(inputs), f"{seed} {kind.name}", seconds
        ):
            counts[ending.how] += 1
            if ending.how == FAILED:
                faults.append(f"{ending.number}: {ending.why}".replace(scratch, ""))
    return Row(
        kind=kind.name,
        inputs=inputs,
        accepted=counts[ACCEPTED],
        refused=counts[REFUSED],
        failed=counts[FAILED],
        faults=tuple(faults[:_SHOWN_FAULTS]),
    )


def fuzzed_inputs_table(result: Result) -> str:
    """What became of damaged inputs."""
    lines = [head("damaged", "inputs", "read as their bytes say", "refused in one line", "failed")]
    keys = ("inputs", "accepted", "refused", "failed")
    for row in result["rows"]:
        lines.append(line(row["kind"], *(f"{row[key]:,}" for key in keys)))
    totals = (sum(row[key] for row in result["rows"]) for key in keys)
    lines.append(line("together", *(f"{total:,}" for total in totals)))
    lines.append(
        "\nFailed would be a traceback, another answer than the bytes hold, no answer within "
        f"{result['setting']['seconds']:g} s, or more than 4 GiB of memory. "
        f"{processor_and_software(result['machine'])}"
    )
    return "\n".join(lines)


@click.command()
@click.option("--inputs", default=10_000, show_default=True, help="Of all kinds together.")
@click.option("--seed", default=0, show_default=True)
@click.option("--seconds", default=60.0, show_default=True, help="Longest time for one input.")
@click.option("--only", help="One kind, of which all inputs are; writes nothing.")
@click.option("--smoke", is_flag=True, help="Writes nothing.")
def main(*, inputs: int, seed: int, seconds: float, only: str | None, smoke: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # threads do not live on in a forked process
    chosen = [kind for kind in KINDS if only in (None, kind.name)]
    if not chosen:
        raise click.BadParameter(f"one of {', '.join(kind.name for kind in KINDS)}")
    setting = {"seed": seed, "seconds": seconds, "inputs": inputs}
    writes = not (smoke or only)
    rows = []
    for kind in chosen:
        count = inputs if only else inputs * kind.share // 100
        row = measure(kind, count, seed, seconds)
        rows.append(row)
        click.echo(json.dumps(asdict(row)))
        if writes:
            write_result(_RESULT, setting, rows=rows)


if __name__ == "__main__":
    main()
