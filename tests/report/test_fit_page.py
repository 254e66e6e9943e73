"""The page of a fit is as inert, whole and readable as the report of a study; terminal and page tell the same numbers."""

from __future__ import annotations

import functools
import io
import json
import re

import html5lib
import msgspec
import numpy as np
import plotly.offline
import pytest
from rich.console import Console

from tests.report import fit_sample
from tests.report.test_page import NAMES, STUB, browse, content, digest, needs_chromium, parse, policy_of, shape
from towtank.report import fit_figures, fit_page, fit_tables
from towtank.report.fit_terminal import show_fit

ANSWERS = {"chinchilla": fit_sample.chinchilla(), "sigmoid": fit_sample.sigmoid(), "refused": fit_sample.refused()}


@pytest.fixture
def small(monkeypatch):
    """Pages with a stub for plotly."""
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: STUB)


def figures_of(tree):
    (data,) = [s for s in tree.iter("script") if s.get("type") == "application/json"]
    return json.loads(content(data))


@functools.cache
def rendered(name):
    """The page of an answer; call it under `small`."""
    return fit_page.render(ANSWERS[name])


@functools.cache
def named(name):
    """The page of an answer full of this name, as a browser would build it; call it under `small`."""
    return parse(fit_page.render(fit_sample.chinchilla(name, name, name)))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["script", "template"])
def test_names_of_the_user_change_nothing_and_run_nothing(kind):
    plain, nasty = named("plain"), named(NAMES[kind])
    assert shape(nasty) == shape(plain)
    for element in nasty.iter():
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert not any(name.startswith("on") or name in ("src", "style") for name in element.attrib)
    assert "\u202e" not in content(nasty)


def test_policy_allows_exactly_what_is_in_the_page():
    text = fit_page.render(ANSWERS["sigmoid"])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2 and len(scripts[0]) > 1e6
    policy = policy_of(parse(text.replace(scripts[0], "")))
    assert policy["default-src"] == ["'none'"] and policy["script-src"] == [digest(s) for s in scripts]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ANSWERS)
def test_document_is_valid_and_every_figure_has_its_place(name):
    text = rendered(name)
    html5lib.HTMLParser(strict=True).parse(text)
    tree = parse(text)
    places = {d.get("id") for d in tree.iter("div") if "plot" in (d.get("class") or "").split()}
    assert set(figures_of(tree)["figures"]) == places
    kinds = {p.rsplit("-", 1)[0] for p in places}
    assert kinds == {
        "chinchilla": {"fit", "residuals", "backtest", "profiles"}, "sigmoid": {"fit", "residuals"}, "refused": set(),
    }[name]  # fmt: skip
    told = " ".join(content(next(tree.iter("main"))).split())
    assert ANSWERS[name].verdict.reason in told and ANSWERS[name].sentence in told


@pytest.mark.usefixtures("small")
def test_colours_of_the_figures_all_have_a_dark_twin():
    drawn = figures_of(parse(rendered("chinchilla")))
    used = set(re.findall(r'"(#[0-9a-f]{6})"', json.dumps(drawn["figures"])))
    assert used and used <= set(drawn["twins"])


def test_figures_draw_the_numbers_of_the_answer():
    answer = ANSWERS["chinchilla"]
    (along, _), (left, _) = fit_figures.law_along(answer), fit_figures.residuals(answer)
    *_, law, rows = along.data
    assert list(law.y) == [v.value for _, v in answer.slices[0].line]
    assert list(rows.y) == [y for _, y in answer.slices[0].points]
    assert [m == "diamond" for m in rows.marker.symbol] == [p.name in ("row 3", "row 5") for p in answer.points]
    np.testing.assert_allclose(left.data[0].y, [100 * (p.measured / p.fitted - 1) for p in answer.points], atol=1e-9)
    (hidden,) = fit_figures.backtests(answer)
    first = answer.backtest.points[0]
    assert hidden.data[0].x[0] == pytest.approx(100 * (first.predicted.value / first.measured - 1), rel=1e-12)
    assert [p.inside for p in answer.backtest.points] == [False, True, True]


def test_a_variable_that_may_be_zero_gets_a_linear_axis_and_the_forecast_its_mark():
    (fig,) = fit_figures.law_along(ANSWERS["sigmoid"])
    assert fig.layout.xaxis.type is None and fig.data[-1].name == "predicted" and fig.data[-1].x == (12.0,)


def said(answer, width=100):
    out = io.StringIO()
    show_fit(answer, Console(file=out, width=width, markup=False, highlight=False, emoji=False))
    return out.getvalue()


def test_the_terminal_tells_coefficients_backtest_forecast_and_why_it_is_weak():
    told = said(ANSWERS["chinchilla"])
    for part in (
        "WEAK: At N = 7e+10", "hiding the largest run missed", "objective: 0.00101827", "at a bound: E", "log A - 16.8 alpha",
        "median 0.35 %, rms 1.1 %, worst 2 % (row 3)", "1.95 to 2", "refuse", "7e+15 is too far beyond", "independent runs: 8",
    ):  # fmt: skip
        assert part in told, part
    assert told.isascii() and max(map(len, told.splitlines())) <= 100
    assert max(map(len, said(ANSWERS["chinchilla"], 40).splitlines())) <= 40
    assert "REFUSE" in said(ANSWERS["refused"]) and "Coefficients" not in said(ANSWERS["refused"])


def test_page_and_terminal_show_the_same_table():
    rows = fit_tables.coefficients(ANSWERS["chinchilla"]).rows
    assert [row[0].shown for row in rows] == list(fit_sample.TRUE)
    assert rows[0][1].shown == "482" and rows[0][2].shown == "438.2 to 530.2"
    told = said(ANSWERS["chinchilla"])
    assert all(cell.shown in told for row in rows for cell in row)


def test_the_answer_is_json():
    read = json.loads(msgspec.json.encode(ANSWERS["chinchilla"]))
    assert read["coefficients"]["E"]["value"] == 1.82 and read["forecasts"][1]["value"] is None


@needs_chromium
def test_browser_draws_every_figure(tmp_path):
    dom, log = browse(fit_page.write_fit(fit_sample.chinchilla(NAMES["script"]), tmp_path / "fit.html"))
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    assert len(re.findall(r'<div class="plot [^>]*js-plotly-plot', dom)) == 2 + 2 + 1 + 5
    assert "<title>owned" not in dom
    assert not re.search(r"Content Security Policy|Uncaught|CONSOLE.*(error|Error)", log), log[-2000:]
