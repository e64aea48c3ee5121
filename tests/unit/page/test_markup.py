"""Values from outside are text in the page, whatever they hold."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from sparseserve.page.charts import Bars, Strip, lying_bars, strips
from sparseserve.page.markup import Html, element, table


class Read(HTMLParser):
    """What a browser would see: elements, attributes and text."""

    def __init__(self, markup: Html) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(markup.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


printed = st.text().filter(lambda text: text.isprintable() and "\xa0" not in text)


@settings(max_examples=30)
@given(printed, printed)
def test_text_and_attributes_come_back_as_they_went_in(text: str, value: str) -> None:
    read = Read(element("p", text, element("code", text), title=value))
    assert read.words == text + text
    assert read.tags == [("p", {"title": value}), ("code", {})]


@settings(max_examples=30)
@given(st.text())
def test_nothing_but_what_prints_reaches_the_page(text: str) -> None:
    markup = element("p", text).text
    assert markup.replace("\n", "").isprintable()
    markup.encode()


def test_a_hostile_name_is_a_name_in_tables_and_charts() -> None:
    name = '"><script>alert(1)</script>'
    for markup in (
        table(name, (name,), [(name,)]),
        strips(name, [name], [Strip(name, (1.0,), name)]),
        lying_bars(name, (name, name), [Bars(name, (1.0, 2.0), (name, name))]),
    ):
        assert "script" not in {tag for tag, _ in Read(markup).tags}
        assert "<script" not in markup.text


def heights(markup: Html) -> list[float]:
    bars = [attributes for tag, attributes in Read(markup).tags if tag == "rect"]
    return [float(bar["height"] or 0) for bar in bars]


def test_upright_bars_are_as_high_as_their_values_to_one_scale() -> None:
    rows = [Strip("a", (0.1, None, 0.4), ""), Strip("b", (0.2, float("nan"), 0.0), "")]
    found = heights(strips("errors", ["0", "1", "2"], rows))
    tallest = max(found)
    assert [height / tallest for height in found[:3]] == [0.25, 1.0, 0.5]
    assert len(found) == 4
    halved = heights(strips("errors", ["0"], [Strip("a", (0.5,), "")], full=1.0))
    assert halved == [tallest / 2]


def test_the_reference_stands_where_a_bar_of_its_value_ends() -> None:
    chart = lying_bars(
        "speed", ("fast",), [Bars("x", (1.0,), ("",)), Bars("y", (2.0,), ("",))], reference=1.0
    )
    tags = Read(chart).tags
    bar = next(attributes for tag, attributes in tags if tag == "rect")
    [line] = [attributes for tag, attributes in tags if tag == "line"]
    assert float(line["x1"] or 0) == float(bar["x"] or 0) + float(bar["width"] or 0)
