"""report.html of a run that has everything in it, and of runs that lack something."""

import itertools
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from specdiff import bench
from specdiff.bench import (
    details,
    drawing,
    figures,
    paper_figures,
    report,
    report_figures,
    results,
    sweeps,
)
from specdiff.bench.journal import parse
from specdiff.bench.metrics import Speedup
from specdiff.bench.results import PartResult
from specdiff.errors import MissingExtraError, UsageError

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "stop"}
DRAWS = figures.DRAWS | sweeps.DRAWS


class Walk(HTMLParser):
    """The page as a browser reads it: matching tags, ids, links, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [
            v
            for n, v in attrs
            if n in ("src", "href", "xlink:href", "action", "data", "srcset") and v
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(
        synthetic.results(
            synthetic.part(), synthetic.empty_part(), paper=synthetic.paper(), status="partial"
        )
    )


def test_every_section_is_there(page: str) -> None:
    text = " ".join(Walk(page).text)
    assert set(report_figures.CAPTIONS) == set(DRAWS)
    for title, _ in report_figures.CAPTIONS.values():
        assert title in text
    for phrase in (
        "What was run",
        "Main comparison",
        "by task",
        "How draft length",
        "Equality at temperature 0",
        "What is missing",
        "Answers",
        "Table 2",
        "Appendix A",
        "Not finished",
        "--resume",
        "no weights",
        "cost/4096: out of memory",
        "near tie",
        "0123456789ab",
        "2.35",
        "not known",
        "slower",
    ):
        assert phrase in text, phrase


def test_details_and_the_table_for_a_page() -> None:
    part = synthetic.part_result()
    lines = {(row["baseline"], row["T"], row["K"]): row for row in details.rows(part)}
    sedd = lines["sedd", "1", "4"]
    assert sedd["accepted by position"] == "0.80 0.74 0.69 0.64"
    assert float(sedd["draft"]) == pytest.approx(1000 * 0.2 / 34, abs=0.01)
    assert ("hf", "0", "") not in lines and lines["ours-vanilla", "0", ""]["draft"] == "0.00"
    text = "\n".join(details.markdown(synthetic.results()))
    assert "| 0 | `sedd`, K=4 | 1.36x (1.16-1.56) | 1.70x" in text
    assert "0.84x (0.71-0.97), a slow-down" in text and "A processor, 2 threads" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(details.COLUMNS) + 1}


def test_the_page_is_sound_and_stands_alone(page: str) -> None:
    walk = Walk(page)
    assert len(walk.ids) == len(set(walk.ids)), "an id twice"
    assert all(address.startswith("#") for address in walk.addresses), [
        a for a in walk.addresses if not a.startswith("#")
    ]
    assert {address[1:] for address in walk.addresses} <= set(walk.ids), "a link to nowhere"
    assert (
        "script" not in walk.tags and "@import" not in page and not re.search(r"url\((?!#)", page)
    )
    assert "{{" not in page and "{%" not in page and "Undefined" not in page
    assert "prefers-color-scheme: dark" in page


def test_what_a_model_or_a_user_wrote_is_text(page: str) -> None:
    assert "<script" not in page and "<b>softly" not in page
    text = "".join(Walk(page).text)
    assert synthetic.EVIL in text and "<script>alert('output')</script>" in text
    assert " falls <b>softly</b>" in text
    assert re.search(r"<mark> falls &lt;b&gt;softly", page) and "<mark>Rain" not in page


def test_figures_are_xml_in_the_colors_of_the_page(page: str) -> None:
    elements = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(elements) == len(DRAWS)
    for text in elements:
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img" and len(root.get("aria-label", "")) > 30
        assert "currentColor" in text
        for color in (drawing.INK, drawing.GRID, "#000000", "#ffffff"):
            assert color not in text


def test_a_name_cannot_leave_its_figure() -> None:
    name = '"><script>&$\\frac'
    part = synthetic.part_result(
        cells=[synthetic.cell("hf"), synthetic.cell("ours-vanilla"), synthetic.cell(name)]
    )
    text = next(report_figures.figures(part, "x")).svg
    assert text is not None and "<script" not in text
    assert ElementTree.fromstring(text).get("aria-label", "").count("<script") > 0


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 1.0)], ids=["one temperature", "two"])
def test_no_text_is_cut_off_or_covers_another(name: str, temperatures: tuple[float, ...]) -> None:
    every = synthetic.part()["cells"]
    cells = [c for c in every if c["temperature"] in temperatures or c["stage"] == "batch"]
    with drawing.style():
        figure = DRAWS[name](synthetic.part_result(cells=cells))
        assert isinstance(figure, drawing.Drawing)
        check_texts(figure)


def check_texts(figure: drawing.Drawing) -> None:
    boxes = texts(figure)
    assert len(boxes) > 5
    edge = figure.figure.bbox
    for text, box in boxes:
        assert box.x0 >= edge.x0 and box.y0 >= edge.y0, f"{text!r} is cut off"
        assert box.x1 <= edge.x1 and box.y1 <= edge.y1, f"{text!r} is cut off"
        assert box.height >= 9, f"{text!r} is tiny"
    for (text, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.overlaps(b), f"{text!r} covers {other!r}"


def embedded_parts() -> list[PartResult]:
    names = ("cnn_dailymail/smollm2-135m", "openwebtext/smollm2-135m", "lm1b/smollm2-135m")
    return [synthetic.part_result(name=name + end) for name in names for end in ("", " finetuned")]


@pytest.mark.parametrize("name", paper_figures.DRAWS)
def test_the_papers_figures_hold_every_data_set(name: str) -> None:
    with drawing.style():
        figure = paper_figures.DRAWS[name](embedded_parts())
        assert isinstance(figure, drawing.Drawing)
        check_texts(figure)
    assert all(part.name in figure.alt for part in embedded_parts())
    assert isinstance(paper_figures.DRAWS[name]([synthetic.part_result(cells=[])]), str)


def texts(sheet: drawing.Drawing) -> list[tuple[str, Any]]:
    """Every visible text and its box, slightly shrunk."""
    canvas = FigureCanvasAgg(sheet.figure)
    canvas.draw()
    hidden = {
        id(text)
        for axes in sheet.figure.axes
        if not axes.get_visible()
        for text in axes.findobj(Text)
    }
    for axis in (axis for axes in sheet.figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond = [
            t
            for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            if not low - 1e-9 <= t.get_loc() <= high + 1e-9
        ]
        hidden |= {id(label) for tick in beyond for label in (tick.label1, tick.label2)}
    visible = [
        t
        for t in sheet.figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and id(t) not in hidden
    ]
    return [
        (t.get_text(), t.get_window_extent(canvas.get_renderer()).padded(-0.6)) for t in visible
    ]


def test_runs_that_lack_something() -> None:
    """No sweeps, no references, a run interrupted at once, one without any part."""
    names = ("speedup_vs_hf", "speedup_vs_vanilla", "tau", "alpha", "per_position")
    nothing = dict.fromkeys((*names, "break_even_tau", "exact"))
    cell = synthetic.cell("sedd", **nothing, seconds={"total": 1.0}, tasks={})
    lists = ("conditional", "batches", "outputs", "tuning", "divergences")
    few = synthetic.part(
        cells=[cell],
        costs={"target": [], "draft": []},
        **{name: [] for name in lists},
    )
    run = synthetic.results(few, environment=None, status="partial")
    text = " ".join(Walk(report.page(run)).text)
    assert "sweeps of draft length and diffusion steps were not run" in text
    assert "no cost curve was measured" in text
    assert "No answers were recorded" in text and "No environment was recorded" in text
    assert "Nothing was compared" in text and "No answer differs" not in text
    greedy = synthetic.part(cells=[synthetic.cell("sedd", exact=1.0)], divergences=[])
    assert "No answer differs" in report.page(synthetic.results(greedy))
    for parts in ([synthetic.empty_part()], []):
        assert "What was run" in report.page(synthetic.results(parts=parts))
    started = synthetic.empty_part() | {"missing": None, "notes": []}
    assert "no cell of the main comparison" in report.page(synthetic.results(started))


def test_a_slow_down_is_called_one() -> None:
    def text(**changes: Any) -> str:
        part = synthetic.part_result(cells=[synthetic.cell("sedd", **changes)])
        return " ".join(report.sentences(part))

    slow = text(speed=15.0)
    fast = text(speed=50.0)
    assert "slower in 5 of 5 turns. A slow-down" in slow and "faster" not in slow
    assert "0.60x" in slow and "needs 1.80 to break even" in slow
    assert "faster in 5 of 5 turns" in fast and "slow" not in fast
    assert "no clear difference: faster in 2 of 5 turns" in text(speed=26.0)
    most = Speedup(0.8, 0.6, 1.3, turns=10, faster=2)
    assert report.agreement(most) == "slower in 8 of 10 turns"
    assert report.verdict(replace(most, faster=3)) == "no clear difference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"schema": 2}, "has schema 2, and this version reads 1"),
        (lambda d: [], "has schema None"),
        (lambda d: {n: v for n, v in d.items() if n != "paper"}, "has no 'paper'"),
        (lambda d: d | {"parts": [{"name": "x"}]}, "parts[0] has no 'model'"),
        (
            lambda d: d | {"parts": [d["parts"][0] | {"cells": [{"stage": "main"}]}]},
            "parts[0].cells[0] has no 'baseline'",
        ),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(change(synthetic.whole())))
    with pytest.raises(UsageError, match=re.escape(message)):
        results.read(tmp_path)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = synthetic.results(paper=synthetic.paper())
    results.write(tmp_path, run)
    assert results.read(tmp_path) == run
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record) == set(synthetic.whole())
    assert set(record["parts"][0]) == set(synthetic.part())
    assert set(record["parts"][0]["cells"][0]) == set(synthetic.cell("hf"))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "pa')
    with pytest.raises(UsageError, match=r"results\.json is damaged"):
        results.read(tmp_path)
    with pytest.raises(UsageError, match="no results in"):
        results.read(tmp_path / "nowhere")


def test_without_the_extra_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("figures", "sweeps"):
        monkeypatch.delattr(bench, name)
        monkeypatch.delitem(sys.modules, f"specdiff.bench.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(
        MissingExtraError, match=r"^the report needs matplotlib:  pip install 'specdiff\[bench\]'$"
    ):
        report.write(tmp_path, synthetic.results())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_was_not_measured_is_not_said_to_pay() -> None:
    def suffix(*speeds: float | None) -> str:
        sizes = [
            {"batch": 2**i, "tokens_per_second": s, "vanilla_tokens_per_second": 10.0}
            for i, s in enumerate(speeds)
        ]
        record = {"baseline": "sedd", "temperature": 0.0, "break_even": None, "sizes": sizes}
        return sweeps.break_even(parse(results.BatchCurve, record))

    assert suffix(20.0, 20.0) == " (pays at every size)"
    assert suffix(20.0, 20.0, None) == " (pays up to batch 2, then not measured)"
    assert suffix(None, None) == ""
