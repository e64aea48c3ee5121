"""The demo's verdict says what the committed benches found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo.__main__ import FULL, LIGHT, Road
from benchmarks.demo.verdict import NOTICEABLE, Findings, Pair, Speed, verdict
from benchmarks.harness.results import RESULTS, read_result
from sparseserve.cli.main import cli

BENCHES = sorted(RESULTS.glob("bench-*.json"))
MODEL, FILE = Path("demo/small"), Path("demo/bench.json")
TWICE_AS_FAST, AS_FAST = Pair(2.0, 1.0), Pair(1.0, 1.0)


def said(found: Findings) -> str:
    return verdict(found, MODEL, FILE)


def faster_and_not(text: str) -> tuple[str, str]:
    """Return what comes after "faster on this processor" and what after "It is not faster"."""
    line = next(line for line in text.splitlines() if "The 2:4 model is" in line)
    faster, _, not_faster = line.partition("It is not faster")
    return faster, not_faster


@pytest.fixture(params=BENCHES, ids=lambda path: path.stem)
def bench(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_result(request.param)


def test_it_names_perplexities_sizes_files_and_the_next_command(bench: dict[str, Any]) -> None:
    text = said(Findings.from_json(bench))
    for side in ("model", "baseline"):
        assert f"{bench[side]['perplexity']:,.1f}" in text
        assert f"{bench[side]['weight_bytes'] / 2**20:,.0f} MiB" in text
    assert f"{MODEL}: " in text
    assert f"{FILE}: " in text
    assert text.splitlines()[-1] == f"  sparseserve serve {MODEL}"


def test_the_share_of_the_size_that_is_saved_is_that_of_bench(bench: dict[str, Any]) -> None:
    percent = round(100 * (1 - bench["weight_bytes_ratio"]))
    assert f"dense {bench['baseline']['weight_bytes'] / 2**20:,.0f} MiB ({percent} % less)" in said(
        Findings.from_json(bench)
    )


def test_first_and_last_batch_stand_with_both_times(bench: dict[str, Any]) -> None:
    lines = [line for line in said(Findings.from_json(bench)).splitlines() if " ms, dense " in line]
    rows = bench["model"]["latency"]
    for row, key, name in (
        (rows[0], "ttft_seconds", "TTFT"),
        (rows[-1], "tpot_seconds", "TPOT"),
    ):
        start = f"{row['batch_size']} prompt"
        time = f"{row[key]['median'] * 1000:,.1f} ms, dense"
        assert any(name in line and start in line and time in line for line in lines)
    assert len(lines) == 2 * min(2, len(rows))


def test_where_it_is_not_faster_it_says_so(bench: dict[str, Any]) -> None:
    """The oracle is bench's own, which pairs the runs; close calls may fall either way."""
    faster, not_faster = faster_and_not(said(Findings.from_json(bench)))
    for key, words in (("prefill", "to the first token"), ("decode", "per output token")):
        for row in bench["speedups"]:
            if abs(row[key] - 1) < 2 * NOTICEABLE:
                continue
            part = faster if row[key] > 1 else not_faster
            if not not_faster:  # faster throughout
                assert row[key] > 1
                continue
            (counts,) = re.findall(rf"{words} with ([\d, and]+) prompt", part)
            assert str(row["batch_size"]) in re.findall(r"\d+", counts)


def speed(prompts: int, ttft: Pair, tpot: Pair) -> Speed:
    return Speed(prompts, 128, ttft=ttft, tpot=tpot)


def findings(*speeds: Speed) -> Findings:
    return Findings("some processor", Pair(20.0, 30.0), Pair(4.0, 2.0), Pair(4.0, 2.0), speeds)


def test_a_model_that_gains_no_speed_is_not_called_faster() -> None:
    text = said(findings(speed(1, AS_FAST, Pair(1.0, 1.5)), speed(8, AS_FAST, Pair(1.0, 0.99))))
    assert "The 2:4 model is not faster than the dense one on this processor (some proc" in text


def test_a_model_that_is_faster_throughout_is_called_so() -> None:
    text = said(findings(speed(1, TWICE_AS_FAST, TWICE_AS_FAST)))
    assert "The 2:4 model is faster than the dense one on this processor (some processor)." in text
    assert (
        "TTFT), 1 prompt at once of 128 tokens: 1,000.0 ms, dense 2,000.0 ms (50 % less)." in text
    )
    assert "not faster" not in text


def test_what_is_faster_and_what_is_not_is_said_by_prompts_at_once() -> None:
    text = said(
        findings(
            speed(1, AS_FAST, TWICE_AS_FAST),
            speed(2, AS_FAST, TWICE_AS_FAST),
            speed(8, TWICE_AS_FAST, AS_FAST),
        )
    )
    assert (
        "to the first token with 8 prompts at once and per output token with 1 and 2 prompts at "
        "once. It is not faster to the first token with 1 and 2 prompts at once and per output "
        "token with 8 prompts at once."
    ) in text


def test_a_larger_model_is_not_called_smaller() -> None:
    found = replace(findings(speed(1, AS_FAST, AS_FAST)), disk=Pair(100.0, 150.0))
    assert "(50 % more)" in said(found)
    assert "(the same)" in said(found)


@pytest.mark.parametrize("road", [LIGHT, FULL], ids=["light", "full"])
def test_the_demo_gives_options_that_its_commands_have(road: Road) -> None:
    for command, options in (("prune-and-export", road.pruning), ("bench", road.measuring)):
        known = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known


def test_only_the_first_look_points_to_the_full_demo() -> None:
    assert "--full" in LIGHT.words
    assert "--full" not in FULL.words
    assert "--recipe" not in FULL.pruning
