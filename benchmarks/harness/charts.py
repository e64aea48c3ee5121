"""Draws the two charts of the README from the committed results.

``python -m benchmarks.harness.charts`` writes them as SVG, which needs no browser and no plotting
package; with ``--check`` it changes nothing and fails if one is not what its results say.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click

from benchmarks.quality.compare import default_variant
from benchmarks.quality.tables import further_windows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_WIDTH, _LEFT, _RIGHT, _MARGIN = 720, 150, 110, 16
_BAR, _BAR_GAP, _GROUP_GAP, _PANEL_GAP = 12, 2, 7, 22
_STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { font: 12px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .panel { font-weight: 600 }
  .faint { fill: #59636e }
  .reference { stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 4 3 }
  .bar0 { fill: #0969da } .bar1 { fill: #bc4c00 } .bar2 { fill: #8250df } .bar3 { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d }
    text { fill: #f0f6fc }
    .faint { fill: #9198a1 }
    .reference { stroke: #9198a1 }
    .bar0 { fill: #4493f8 } .bar1 { fill: #f0883e } .bar2 { fill: #ab7df8 } .bar3 { fill: #3fb950 }
  }
"""


@dataclass(frozen=True)
class Group:
    """The bars that belong to one label; None where a series was not measured."""

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """Groups under one heading."""

    heading: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Chart:
    """Horizontal bars from zero.

    Attributes:
        title: What is drawn, and in which unit.
        series: Their names, in the order of each group's values.
        reference: Where the dense model stands, in the unit of the bars.
        panels: The bars.
        source: Where and when it was measured.
    """

    title: str
    series: tuple[str, ...]
    reference: float
    panels: tuple[Panel, ...]
    source: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The longest bar."""
        values = [v for panel in self.panels for group in panel.groups for v in group.values if v]
        return max([*values, self.reference])


def quality_chart() -> Chart:
    """Return the loss of 2:4 by tool: two models with 256 windows, and three tools with 64."""
    panels = (
        _tools("SmolLM2-135M, 256 calibration windows", "peers-smollm2-256"),
        _tools("Gemma-3-270M, 256 calibration windows", "peers-gemma3-256"),
        _tools("SmolLM2-135M, 64 calibration windows", "peers-smollm2-mixed"),
    )
    results = [_result(f"peers-{name}") for name in ("smollm2-256", "gemma3-256", "smollm2-mixed")]
    dates = sorted(result["machine"]["date"] for result in results)
    return Chart(
        title="What 2:4 costs: gap to the dense model (shorter is better)",
        series=(
            "sparseserve, default recipe",
            "llm-compressor, SparseGPT",
            "Model Optimizer, SparseGPT",
            "sparseserve, recipe best",
        ),
        reference=0.0,
        panels=panels,
        source=(
            "Gap = ln(perplexity / dense perplexity); the perplexity stands beside each bar.",
            "Model Optimizer returns masks only, for training afterwards.",
            "The recipe best takes further windows, about as many again.",
            f"Calibrated on speeches and Wikipedia; measured {dates[0]} to {dates[-1]}.",
        ),
    )


def speed_chart() -> Chart:
    """Return how many times as fast as the dense model the 2:4 model decodes and reads prompts."""
    names = {
        "bench-smollm2-2of4-avx512-bf16": "AVX-512 with BF16, bfloat16 arithmetic",
        "bench-smollm2-2of4-bf16": "AVX-512, float32 arithmetic, weights stored in bfloat16",
        "bench-smollm2-2of4": "AVX-512, float32 arithmetic, weights stored in float32",
        "bench-smollm2-2of4-bf16-avx2": "AVX2, float32 arithmetic, weights stored in bfloat16",
        "bench-smollm2-2of4-amx": "AMX, bfloat16 arithmetic: layers run dense",
    }
    results = [_result(name) for name in names]
    (plan,) = {(each["plan"]["input_lengths"][0], each["plan"]["repeats"]) for each in results}
    dates = sorted(each["date"][:10] for each in results)
    return Chart(
        title="Speed of SmolLM2-135M under vLLM on two cores, 2:4 / dense (longer is better)",
        series=("decoding", "reading the prompt"),
        reference=1.0,
        panels=tuple(
            Panel(heading, tuple(_speedup(row) for row in result["speedups"]))
            for heading, result in zip(names.values(), results, strict=True)
        ),
        source=(
            f"Prompts of {plan[0]} tokens; medians of the ratios of {plan[1]} paired runs.",
            f"Measured {dates[0]} to {dates[-1]} by sparseserve bench.",
        ),
    )


CHARTS: dict[str, Callable[[], Chart]] = {
    "docs/images/quality.svg": quality_chart,
    "docs/images/speed.svg": speed_chart,
}


def _result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _tools(heading: str, name: str) -> Panel:
    """Return the gaps of our recipes and of the other tools' SparseGPT, text by text."""
    result = _result(name)
    ours = json.loads((RESULTS / result["ours"]).read_text(encoding="utf-8"))["runs"]
    (dense,) = (run for run in ours if run["variant"] == "dense")
    theirs = {
        tool: [run for run in result["runs"] if run["worker"]["tool"] == tool]
        for tool in ("llmcompressor", "nvidia-modelopt")
    }
    series = [
        [run for run in ours if run["variant"] == default_variant()],
        theirs["llmcompressor"],
        theirs["nvidia-modelopt"],
        [run for run in ours if further_windows(run["variant"])],
    ]
    groups = []
    for text in result["setting"]["texts"]:
        found = [[run["perplexity"][text] for run in runs] for runs in series]
        base = dense["perplexity"][text]
        groups.append(
            Group(
                f"{text} ({base:.1f} dense)",
                tuple(_gap(values, base) if values else None for values in found),
                tuple(f"{statistics.fmean(values):.1f}" if values else "" for values in found),
            )
        )
    return Panel(heading, tuple(groups))


def _gap(perplexities: list[float], dense: float) -> float:
    """Return the mean over seeds of ln(perplexity / dense perplexity)."""
    return statistics.fmean(math.log(value / dense) for value in perplexities)


def _speedup(row: dict[str, Any]) -> Group:
    values = row["decode"], row["prefill"]
    many = "s" if row["batch_size"] > 1 else ""
    return Group(
        f"{row['batch_size']} sequence{many}", values, tuple(f"{each:.2f}" for each in values)
    )


def draw(chart: Chart) -> str:
    """Return ``chart`` as an SVG that reads well on light and on dark pages."""
    lines, top = _legend(chart)
    scale = (_WIDTH - _LEFT - _RIGHT) / chart.largest
    reference = _LEFT + chart.reference * scale
    for panel in chart.panels:
        lines.append(_text(_MARGIN, top, panel.heading, "panel"))
        top += 10
        start = top
        for group in panel.groups:
            drawn, top = _bars(group, scale, reference, top)
            lines += drawn
        lines.append(
            f'<line class="reference" x1="{reference:.1f}" x2="{reference:.1f}" '
            f'y1="{start - 3}" y2="{top - _GROUP_GAP + 3}"/>'
        )
        top += _PANEL_GAP
    for line in chart.source:
        lines.append(_text(_MARGIN, top, line, "faint"))
        top += 17
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        f'width="{_WIDTH}" height="{top}" role="img" aria-label="{escape(chart.title)}">\n'
        f"<style>{_STYLE}</style>\n"
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{top - 1}" rx="6"/>\n'
        f"{body}\n</svg>\n"
    )


def _legend(chart: Chart) -> tuple[list[str], int]:
    """Return the title and the names of the series, and the height at which the panels begin."""
    lines = [_text(_MARGIN, 28, chart.title, "title")]
    left, top = _MARGIN, 52
    for number, name in enumerate(chart.series):
        width = 17 + 7 * len(name) + 14
        if left + width > _WIDTH:
            left, top = _MARGIN, top + 18
        box = f'x="{left}" y="{top - 10}" width="14" height="10"'
        lines.append(f'<rect class="bar{number}" {box}/>')
        lines.append(_text(left + 17, top, name))
        left += width
    ends = f'x1="{left}" x2="{left + 14}" y1="{top - 5}" y2="{top - 5}"'
    lines.append(f'<line class="reference" {ends}/>')
    lines.append(_text(left + 19, top, "dense"))
    return lines, top + 32


def _bars(group: Group, scale: float, reference: float, top: int) -> tuple[list[str], int]:
    """Return the bars of one group, with figures clear of the reference, and the height below."""
    shown = [number for number, value in enumerate(group.values) if value is not None]
    height = len(shown) * (_BAR + _BAR_GAP) - _BAR_GAP
    lines = [_text(_LEFT - 8, top + height // 2 + 4, group.label, anchor="end")]
    for number in shown:
        width = (group.values[number] or 0.0) * scale
        lines.append(
            f'<rect class="bar{number}" x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR}"/>'
        )
        end = _LEFT + width + 6
        crossed = end - 4 < reference < end + 28
        end = reference + 6 if crossed else end
        lines.append(_text(end, top + _BAR - 2, group.texts[number]))
        top += _BAR + _BAR_GAP
    return lines, top - _BAR_GAP + _GROUP_GAP


def _text(left: float, top: float, text: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{left:.1f}" y="{top}" text-anchor="{anchor}">{escape(text)}</text>'


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a chart is out of date.")
def main(check: bool) -> None:
    for name, chart in CHARTS.items():
        path = ROOT / name
        drawn = draw(chart())
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(drawn, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != drawn:
            raise click.ClickException(f"{name}: run python -m benchmarks.harness.charts")


if __name__ == "__main__":
    main()
