"""The charts show what the committed results say."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from benchmarks.harness import charts
from benchmarks.harness.charts import CHARTS, RESULTS, Chart, Group, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


def chart(*values: float | None, reference: float = 0.0) -> Chart:
    group = Group("a < b", values, tuple(f"{value}" for value in values))
    return Chart("title", ("x", "y", "z"), reference, (Panel("p", (group,)),), ("when",))


def bars(svg: str) -> list[float]:
    """Return the widths of the bars; those of the legend are of another height."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    return [float(r.attrib["width"]) for r in found if r.attrib["height"] == str(charts._BAR)]


@pytest.mark.parametrize("name", CHARTS)
def test_every_committed_chart_is_what_its_results_say(name: str) -> None:
    assert draw(CHARTS[name]()) == (charts.ROOT / name).read_text(encoding="utf-8")


def test_a_chart_that_is_out_of_date_fails_the_check_and_is_drawn_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(charts, "ROOT", tmp_path)
    run = CliRunner().invoke
    assert "run python -m" in run(charts.main, ["--check"]).output
    assert run(charts.main).exit_code == 0
    assert run(charts.main, ["--check"]).exit_code == 0
    (tmp_path / "docs/images/speed.svg").write_text("<svg/>")
    refused = run(charts.main, ["--check"])
    assert refused.exit_code == 1
    assert "docs/images/speed.svg" in refused.output
    assert (tmp_path / "docs/images/speed.svg").read_text() == "<svg/>"


def test_bars_are_as_long_as_their_values_say() -> None:
    first, second, third = bars(draw(chart(0.5, 2.0, 1.0)))
    assert first / second == pytest.approx(0.25, abs=1e-3)
    assert third / second == pytest.approx(0.5, abs=1e-3)


def test_the_line_of_the_dense_model_stands_at_its_value() -> None:
    svg = draw(chart(0.5, 2.0, reference=1.0))
    _, line = ElementTree.fromstring(svg).iter(f"{SVG}line")  # the first is the legend's
    at = float(line.attrib["x1"]) - charts._LEFT
    assert at / max(bars(svg)) == pytest.approx(0.5, abs=1e-3)


def test_a_series_without_a_measurement_has_no_bar() -> None:
    assert len(bars(draw(chart(0.5, None, 1.0)))) == 2


def test_names_are_escaped_and_the_colours_follow_the_page() -> None:
    svg = draw(chart(1.0))
    assert "a &lt; b" in svg
    assert "prefers-color-scheme: dark" in svg


def test_gaps_are_those_of_the_results() -> None:
    panel = CHARTS["docs/images/quality.svg"]().panels[0]
    peers = json.loads((RESULTS / "peers-smollm2-256.json").read_text())
    ours = json.loads((RESULTS / peers["ours"]).read_text())
    dense = next(run for run in ours["runs"] if run["variant"] == "dense")["perplexity"]
    other = peers["runs"][0]["perplexity"]
    for group in panel.groups:
        text = group.label.split()[0]
        assert group.values[1] == pytest.approx(math.log(other[text] / dense[text]))


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_is_drawn_outside_the_picture_or_over_another_bar(name: str) -> None:
    root = ElementTree.fromstring((charts.ROOT / name).read_text(encoding="utf-8"))
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    found = [r for r in root.iter(f"{SVG}rect") if r.attrib["height"] == str(charts._BAR)]
    for bar in found:
        assert 0 <= float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width - 40
        assert float(bar.attrib["y"]) + charts._BAR <= height
    for above, below in pairwise(found):
        assert float(below.attrib["y"]) >= float(above.attrib["y"]) + charts._BAR
    assert not re.search(r"\bnan\b|\binf\b", ElementTree.tostring(root, "unicode"))
