"""report.html of a run that has everything in it, and of runs that lack something."""

import copy
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from specdiff import bench
from specdiff.bench import curves, figures, report, stored, summary, svg
from specdiff.errors import MissingExtraError

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "stop"}
DRAWS: dict[str, figures.Draw] = {
    "speedups": figures.speedups, "figure2": curves.figure2, "gamma": curves.gamma, "positions": figures.positions,
    "conditional": figures.conditional, "costs": curves.costs, "contexts": curves.contexts, "batches": curves.batches,
    "stages": figures.stages,
}  # fmt: skip


class Walk(HTMLParser):
    """What a browser meets: tags that close one another, ids, links, and the text."""

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
        told = dict(attrs)
        self.ids += [told["id"]] if told.get("id") else []
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
        synthetic.whole(
            synthetic.part(), synthetic.empty_part(), paper=synthetic.paper(), status="partial"
        )
    )


def test_every_section_is_there(page: str) -> None:
    told = " ".join(Walk(page).text)
    for title, _ in report.CAPTIONS.values():
        assert title in told
    for wanted in (
        "What was run", "Main comparison", "by task", "How draft length", "Equality at temperature 0", "What is missing", "Answers",
        "Table 2", "Appendix A", "Not finished", "--resume", "no weights", "cost/4096: out of memory", "near tie", "0123456789ab", "2.35",
        "not known", "slower",
    ):  # fmt: skip
        assert wanted in told, wanted


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
    told = "".join(Walk(page).text)
    assert (
        synthetic.EVIL in told
        and "<script>alert('output')</script>" in told
        and " falls <b>softly</b>" in told
    )
    assert re.search(r"<mark> falls &lt;b&gt;softly", page) and "<mark>Rain" not in page


def test_figures_are_xml_in_the_colours_of_the_page(page: str) -> None:
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(found) == len(DRAWS)
    for text in found:
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img" and len(root.get("aria-label", "")) > 30
        assert (
            "currentColor" in text
            and svg.INK not in text
            and svg.GRID not in text
            and "#000000" not in text
            and "#ffffff" not in text
        )


def test_a_name_cannot_leave_its_figure() -> None:
    name = '"><script>&$\\frac'
    part = synthetic.part(
        cells=[synthetic.cell("hf"), synthetic.cell("ours-vanilla"), synthetic.cell(name)]
    )
    text = next(report.figures(part, "x")).svg
    assert text is not None and "<script" not in text
    assert ElementTree.fromstring(text).get("aria-label", "").count("<script") > 0


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("heats", [(0.0,), (0.0, 1.0)], ids=["one temperature", "two"])
def test_no_text_is_cut_off_or_covers_another(name: str, heats: tuple[float, ...]) -> None:
    part = synthetic.part()
    part["cells"] = [c for c in part["cells"] if c["temperature"] in heats or c["stage"] == "batch"]
    with svg.style():
        drawn = DRAWS[name](part)
        assert isinstance(drawn, svg.Drawing)
        boxes = texts(drawn)
        assert len(boxes) > 5
        edge = drawn.figure.bbox
        for said, box in boxes:
            assert (
                box.x0 >= edge.x0 and box.y0 >= edge.y0 and box.x1 <= edge.x1 and box.y1 <= edge.y1
            ), f"{said!r} is cut off"
            assert box.height >= 9, f"{said!r} is tiny"
        for (said, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), f"{said!r} covers {other!r}"


def texts(drawn: svg.Drawing) -> list[tuple[str, Any]]:
    """Every visible text and where it stands, a hair smaller than it is."""
    canvas = FigureCanvasAgg(drawn.figure)
    canvas.draw()
    hidden = {
        id(text)
        for axes in drawn.figure.axes
        if not axes.get_visible()
        for text in axes.findobj(Text)
    }
    for axis in (axis for axes in drawn.figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond = [
            t
            for t in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            if not low - 1e-9 <= t.get_loc() <= high + 1e-9
        ]
        hidden |= {id(label) for tick in beyond for label in (tick.label1, tick.label2)}
    shown = [
        t
        for t in drawn.figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and id(t) not in hidden
    ]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer()).padded(-0.6)) for t in shown]


def test_runs_that_lack_something() -> None:
    """No sweeps, no references, a run that was stopped at once, one without any part."""
    few = synthetic.part(cells=[synthetic.cell("sedd", speedup_vs_hf=None, speedup_vs_vanilla=None, tau=None, alpha=None, per_position=None,
                                               break_even_tau=None, exact=None, seconds={"total": 1.0}, tasks={})],
                         conditional=[], batches=[], costs={"target": [], "draft": []}, outputs=[], tuning=[], divergences=[])  # fmt: skip
    told = " ".join(
        Walk(report.page(synthetic.whole(few, environment=None, status="partial"))).text
    )
    assert (
        "sweeps of draft length and diffusion steps were not run" in told
        and "no cost curve was measured" in told
    )
    assert "No answers were kept" in told and "No environment was recorded" in told
    assert "Nothing was compared" in told and "No answer differs" not in told
    greedy = synthetic.part(cells=[synthetic.cell("sedd", exact=1.0)], divergences=[])
    assert "No answer differs" in report.page(synthetic.whole(greedy))
    for parts in ((synthetic.empty_part(),), ()):
        assert "What was run" in report.page(synthetic.whole(*parts) | {"parts": list(parts)})
    started = synthetic.empty_part() | {"missing": None, "notes": []}
    assert "no cell of the main comparison" in report.page(synthetic.whole(started))


def test_a_slow_down_is_called_one() -> None:
    def said(**changes: Any) -> str:
        return " ".join(
            summary.sentences(synthetic.part(cells=[synthetic.cell("sedd", **changes)]))
        )

    slow, fast = said(speed=15.0), said(speed=50.0)
    assert (
        "slower in 5 of 5 turns. A slow-down" in slow
        and "0.60x" in slow
        and "needs 1.80 to break even" in slow
        and "faster" not in slow
    )
    assert "faster in 5 of 5 turns" in fast and "slow" not in fast
    assert "no clear difference: faster in 2 of 5 turns" in said(speed=26.0)
    most = {"ratio": 0.8, "min": 0.6, "max": 1.3, "turns": 10, "faster": 2}
    assert (
        summary.agreed(most) == "slower in 8 of 10 turns"
        and summary.verdict(most | {"faster": 3}) == "no clear difference"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d | {"schema": 2}, "has schema 2, and this version reads 1"),
        (lambda d: [], "has schema None"),
        (lambda d: {n: v for n, v in d.items() if n != "paper"}, "has no 'paper'"),
        (lambda d: d | {"parts": [{"name": "x"}]}, "part 0 has no 'model'"),
        (
            lambda d: d | {"parts": [d["parts"][0] | {"cells": [{"stage": "main"}]}]},
            "cell 0 of part 0 has no 'baseline'",
        ),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, change: Any, told: str) -> None:

    (tmp_path / "results.json").write_text(json.dumps(change(copy.deepcopy(synthetic.whole()))))
    with pytest.raises(stored.UsageError, match=told):
        stored.read(tmp_path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "pa')
    with pytest.raises(stored.UsageError, match=r"results\.json is damaged"):
        stored.read(tmp_path)
    with pytest.raises(stored.UsageError, match="no results in"):
        stored.read(tmp_path / "nowhere")


def test_without_the_extra_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(bench, "curves")
    monkeypatch.delitem(sys.modules, "specdiff.bench.curves")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(
        MissingExtraError, match=r"^the report needs matplotlib:  pip install 'specdiff\[bench\]'$"
    ):
        report.write(tmp_path, synthetic.whole())
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_was_not_measured_is_not_said_to_pay() -> None:
    def told(*speeds: float | None) -> str:
        sizes = [
            {"batch": 2**i, "tokens_per_second": s, "vanilla_tokens_per_second": 10.0}
            for i, s in enumerate(speeds)
        ]
        return curves.even({"baseline": "sedd", "break_even": None, "sizes": sizes})

    assert told(20.0, 20.0) == " (pays at every size)"
    assert (
        told(20.0, 20.0, None) == " (pays up to batch 2, then not measured)"
        and told(None, None) == ""
    )
