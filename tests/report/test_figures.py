"""Figures show what the answer says, where it says it, in colours that can be told apart."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from tests.report import sample
from towtank.estimate import Interval
from towtank.report import drawing, figures
from towtank.report.traces import drawn

DRAWERS = (
    figures.loss_against_rate,
    figures.optimum_against_size,
    figures.sensitivity_by_size,
    figures.attention_logits,
    figures.best_loss_against_size,
    figures.backtests,
)
PAGES = {"light": "#ffffff", "dark": "#182029"}


def known(x):
    """`x`, which this sample has."""
    assert x is not None
    return x


def traces(fig, name):
    """Traces with exactly this name."""
    return [t for t in drawn(fig) if t.name == name]


def linear(colour):
    """Linear RGB of a hexadecimal colour."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    """Relative luminance (WCAG 2)."""
    return float(linear(colour) @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(a, b):
    """Contrast ratio (WCAG 2)."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Dichromats as linear maps of linear RGB (Vienot, Brettel and Mollon 1999, eq. 3 to 5).
BLIND = {
    "none": np.eye(3),
    "protanope": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deuteranope": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def strings(node):
    """Every string in nested JSON."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        yield from (s for v in node.values() for s in strings(v))
    elif isinstance(node, list):
        yield from (s for v in node for s in strings(v))


@pytest.mark.parametrize("draw", DRAWERS)
def test_nothing_to_show_gives_no_figure(draw):
    assert draw(sample.empty()) == ()


@pytest.mark.parametrize("draw", DRAWERS)
def test_something_to_show_gives_figures(draw):
    assert len(draw(sample.answer())) in (1, 2, 4)


def test_refused_optima_are_not_drawn():
    assert figures.optimum_against_size(sample.refused()) == ()
    panels = figures.loss_against_rate(sample.refused())
    assert not any(t.marker.symbol == "star" for fig in panels for t in drawn(fig))


def test_loss_panels_share_range_and_legend():
    sp, mup = figures.loss_against_rate(sample.answer())
    assert sp.layout.title.text == "sp" and mup.layout.title.text == "mup"
    assert sp.layout.yaxis.range == mup.layout.yaxis.range and sp.layout.xaxis.range == mup.layout.xaxis.range
    names = [sorted({t.name for t in drawn(fig) if t.name and t.showlegend is not False}) for fig in (sp, mup)]
    assert names[0] == names[1]


def test_loss_curve_holds_the_measured_points():
    answer = sample.answer()
    sp = figures.loss_against_rate(answer)[0]
    (curve,) = traces(sp, "width 64")
    points = answer.arms[0].sizes[1].rates
    assert list(curve.x) == [p.lr for p in points]
    assert list(curve.y) == [p.loss for p in points]
    assert list(curve.error_y.array) == [p.stderr or 0.0 for p in points]


def test_optimum_is_marked_with_its_interval():
    answer = sample.answer()
    sp = figures.loss_against_rate(answer)[0]
    stars = [t for t in drawn(sp) if t.marker.symbol == "star"]
    optimum = known(answer.arms[0].sizes[0].optimum)
    assert len(stars) == 3 and stars[0].x[0] == optimum.value
    assert stars[0].x[0] + stars[0].error_x.array[0] == pytest.approx(optimum.high)
    assert stars[0].x[0] - stars[0].error_x.arrayminus[0] == pytest.approx(optimum.low)


def test_diverged_runs_stand_at_the_top():
    sp = figures.loss_against_rate(sample.answer())[0]
    (marks,) = traces(sp, "diverged")
    assert set(marks.y) == {sp.layout.yaxis.range[1]} and set(marks.x) == {2.0**-3}
    assert "diverged" in marks.hovertext[0]


def test_one_bad_run_does_not_flatten_the_rest():
    answer = sample.answer()
    size = answer.arms[0].sizes[0]
    bad = replace(size, rates=(*size.rates[:-1], replace(size.rates[-1], loss=1e6)))
    arm = replace(answer.arms[0], sizes=(bad, *answer.arms[0].sizes[1:]))
    sp = figures.loss_against_rate(replace(answer, arms=(arm,)))[0]
    assert sp.layout.yaxis.range[1] < 10
    assert max(traces(sp, "width 32")[0].y) <= sp.layout.yaxis.range[1]


def test_prediction_and_verification_are_where_they_belong():
    answer = sample.answer()
    (fig,) = figures.optimum_against_size(answer)
    for arm in answer.arms:
        (predicted,), (verified,) = traces(fig, f"{arm.name}, predicted"), traces(fig, f"{arm.name}, verified")
        assert (predicted.x[0], predicted.y[0]) == (256, known(known(arm.prediction).lr).value)
        assert verified.y[0] == known(known(arm.verification).measured).value
        line = next(t for t in traces(fig, arm.name) if t.mode == "lines")
        assert list(zip(line.x, line.y, strict=True)) == [(s, v.value) for s, v in known(arm.lr_law).line]


def test_only_sizes_that_were_trained_or_asked_for_are_labelled():
    answer = sample.answer()
    law = known(answer.arms[0].lr_law)
    fine = replace(law, line=tuple((32 * 2 ** (i / 10), law.line[0][1]) for i in range(31)))
    (fig,) = figures.optimum_against_size(replace(answer, arms=(replace(answer.arms[0], lr_law=fine),)))
    assert fig.layout.xaxis.ticktext == ("32", "64", "128", "256")


def test_backtest_is_relative_to_the_measured_value():
    answer = sample.answer()
    (fig,) = figures.backtests(answer)
    (predicted,), (measured,) = traces(fig, "predicted"), traces(fig, "measured")
    test = known(known(answer.arms[0].lr_law).backtest)
    assert predicted.x[0] == pytest.approx(test.predicted.value / test.measured.value)
    assert all(x == 1 for x in measured.x)
    assert len(fig.layout.yaxis.ticktext) == 6  # two laws in each of two arms, and two verifications


def test_endless_intervals_do_not_flatten_the_points():
    answer = sample.answer()
    endless = Interval(0.01, 1e-300, 1e300)
    law = replace(known(answer.arms[0].lr_law), line=((32.0, endless), (256.0, endless)))
    loss = replace(known(answer.arms[0].loss_law), line=((32.0, Interval(2.4, -1e9, math.inf)),))
    one = replace(answer, arms=(replace(answer.arms[0], lr_law=law, loss_law=loss),))
    low, high = figures.optimum_against_size(one)[0].layout.yaxis.range
    assert high - low < 5  # decades
    low, high = figures.best_loss_against_size(one)[0].layout.yaxis.range
    assert 1.5 < low < 2.205 and 2.421 < high < 3


def test_attention_panels_show_the_limit():
    for fig in figures.attention_logits(sample.answer()):
        assert [s.y0 for s in fig.layout.shapes] == [1e4]
        low, high = fig.layout.yaxis.range
        assert low < 4 < high


def test_a_size_has_one_colour_everywhere():
    answer = sample.answer()
    panels = figures.loss_against_rate(answer) + figures.attention_logits(answer)
    for name in ("width 32", "width 64", "width 128"):
        assert len({t.marker.color for fig in panels for t in traces(fig, name)}) == 1


@pytest.mark.parametrize("name", ["<script>x</script>", "<b>a</b>&amp;", "a%{x}b<extra>c</extra>"])
def test_names_are_no_markup_for_plotly(name):
    for draw in DRAWERS:
        for fig in draw(sample.hostile(name)):
            for found in strings(json.loads(str(fig.to_json()))):
                assert not re.search(r"<(?!br>)", found), found
            assert all(t.hovertemplate is None and t.texttemplate is None for t in drawn(fig))


def test_every_colour_has_a_dark_twin():
    answer = sample.answer()
    twins = figures.dark_twins(answer)
    rgba = {drawing.faded((light, ""), 1).rsplit(",", 1)[0] for light in twins}
    for draw in DRAWERS:
        for fig in draw(answer):
            for found in strings(json.loads(str(fig.to_json()))):
                assert not re.fullmatch(r"#[0-9a-f]{6}", found) or found in twins
                assert not found.startswith("rgba(") or found == "rgba(0,0,0,0)" or found.rsplit(",", 1)[0] in rgba


@pytest.mark.parametrize("theme", PAGES)
def test_colours_stand_out_from_the_page(theme):
    shade = list(PAGES).index(theme)
    colours = [drawing.arm_colour(i) for i in range(6)] + [drawing.size_colour(i, 5) for i in range(5)]
    for colour in colours + [drawing.INK, drawing.ALERT]:
        assert contrast(colour[shade], PAGES[theme]) >= 2.4


@pytest.mark.parametrize("theme", PAGES)
@pytest.mark.parametrize("eye", BLIND)
def test_the_first_arms_can_be_told_apart(theme, eye):
    shade = list(PAGES).index(theme)
    seen = [lab(BLIND[eye] @ linear(drawing.arm_colour(i)[shade])) for i in range(3)]
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(a - b) > 20  # about ten just noticeable differences


@pytest.mark.parametrize("theme", PAGES)
def test_sizes_are_ordered_by_lightness(theme):
    shade = list(PAGES).index(theme)
    steps = np.diff([luminance(drawing.size_colour(i, 6)[shade]) for i in range(6)])
    assert (steps < 0).all() if theme == "light" else (steps > 0).all()


def test_rate_axis_labels_powers_of_two_with_their_value():
    axis = drawing.rate_axis([2.0**-10, 2.0**-3])
    assert "2⁻³<br>0.12" in axis["ticktext"] and len(axis["ticktext"]) <= drawing.MAX_TICKS
