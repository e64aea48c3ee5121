"""One self-contained page with the sensitivities and what they allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sparseserve.budget.knapsack import Frontier, Unit
from sparseserve.budget.prices import UnitSensitivity
from sparseserve.checkpoint.tensors import writing
from sparseserve.errors import MissingExtraError

# Below this a price is drawn as if it were this: a logarithmic axis has no zero.
_LEAST_PRICE = 1e-6


def require_plotly() -> None:
    """Refuse to start work whose plot could not be drawn.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError("plotly", "plots", "plotting sensitivities")


def write_sensitivity_plot(path: Path, units: Sequence[UnitSensitivity], title: str) -> None:
    """Draw the price of every unit over the depth of the model, and the budget they add up to.

    The page needs no network.

    Raises:
        MissingExtraError: plotly is not installed.
        ArtifactError: The disk is full or cannot be written.
    """
    require_plotly()
    from plotly.graph_objects import Bar, Figure, Scatter  # noqa: PLC0415  # optional
    from plotly.subplots import make_subplots  # noqa: PLC0415  # optional

    figure: Figure = make_subplots(
        rows=2,
        cols=1,
        subplot_titles=(
            "Price of each unit, pruned alone",
            "Predicted rise of the perplexity by the share that is pruned",
        ),
    )
    kinds: dict[str, list[UnitSensitivity]] = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    for kind, members in kinds.items():
        bars = Bar(
            name=kind,
            x=[unit.layer for unit in members],
            y=[max(unit.divergence, _LEAST_PRICE) for unit in members],
            customdata=[(unit.label, unit.weights, unit.loss_increase) for unit in members],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]:,} weights<br>"
            "divergence %{y:.5f} nats<br>loss increase %{customdata[2]:.5f} nats",
        )
        figure.add_trace(bars, row=1, col=1)
    total = sum(unit.weights for unit in units)
    curve = Frontier.of([Unit(unit.weights, unit.divergence) for unit in units]).curve()
    line = Scatter(
        x=[weights / total for weights, _ in curve],
        y=[math.expm1(price) for _, price in curve],
        mode="lines",
        showlegend=False,
        hovertemplate="%{x:.1%} pruned<br>perplexity %{y:+.1%}",
    )
    figure.add_trace(line, row=2, col=1)
    figure.update_xaxes(title_text="decoder layer", row=1, col=1)
    figure.update_yaxes(title_text="nats a token", type="log", row=1, col=1)
    figure.update_xaxes(title_text="pruned share of the prunable weights", tickformat=".0%", row=2)
    figure.update_yaxes(title_text="perplexity", tickformat="+.0%", type="log", row=2, col=1)
    figure.update_layout(title=title, height=900)
    with writing(path):
        figure.write_html(path, include_plotlyjs=True)
