"""Draw the figures of the tutorials: run them at full scale and write docs/figures/<name>.png.

    python draw.py                       all that have a `figure`
    python draw.py edge_of_stability     this one

Every tutorial takes up to three minutes on one core. The pictures are taken by a headless Chromium, which must be on the path as
`chromium`, `chromium-browser` or `google-chrome`.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from towtank.report import drawing

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"
WIDTH, HEIGHT = 900, 420
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def colour(index: int) -> str:
    """Colour of the run of an index, the same in all figures."""
    return drawing.arm_colour(index)[0]


def rule(ink: str = drawing.MUTED[0], **at: Any) -> dict[str, Any]:
    """A dashed line across a panel: give its place as x= or y=, in the units of that axis (of a log axis, the value)."""
    (axis, place), other = next(iter(at.items())), {"x": "y", "y": "x"}
    across = other[axis]
    ends = {f"{axis}0": place, f"{axis}1": place, f"{across}0": 0, f"{across}1": 1, f"{across}ref": f"{across} domain"}
    return drawing.rule((ink, ink), **ends)


def panels(each: Sequence[tuple[str, dict[str, Any], dict[str, Any]]], *, height: int = HEIGHT) -> go.Figure:
    """Panels side by side in the house style, with one legend below.

    Args:
        each: of every panel its title, horizontal and vertical axis, see `log_axis` and `linear_axis`.
        height: pixels.
    """
    house: Any = drawing.figure("", {}, {}, height=height).layout
    gap = 0.1 if len(each) < 3 else 0.085
    fig = make_subplots(1, len(each), horizontal_spacing=gap, subplot_titles=[title for title, _, _ in each])
    shared = {k: v for k, v in house.to_plotly_json().items() if k not in ("xaxis", "yaxis", "title", "annotations")}
    fig.update_layout(shared, width=WIDTH, margin={"l": 60, "r": 16, "t": 44, "b": 92})
    fig.update_layout(paper_bgcolor="white", plot_bgcolor="white", legend={"y": -0.2, "x": 0.5, "xanchor": "center"})
    fig.update_annotations(font={"size": 14, "weight": 600})
    for column, (_, x, y) in enumerate(each, 1):
        fig.update_xaxes(house.xaxis.to_plotly_json() | x, row=1, col=column)
        fig.update_yaxes(house.yaxis.to_plotly_json() | y, row=1, col=column)
    return fig


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A log axis that shows the values, those above 0."""
    return drawing.decade_axis(title, values, pad=(0.1, 0.1))


def linear_axis(title: str, **more: Any) -> dict[str, Any]:
    """A linear axis; `more` as plotly has it, such as range or rangemode."""
    return {"title": {"text": title}, **more}


def write(fig: go.Figure, path: Path) -> None:
    """Take the picture of a figure.

    Raises:
        FileNotFoundError: if there is no browser.
        RuntimeError: if it takes no picture.
    """
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"expected one of {', '.join(BROWSERS)} on the path, got none; install Chromium")
    layout: Any = fig.layout
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        body = fig.to_html(include_plotlyjs=True, full_html=False, config={"displayModeBar": False})
        page.write_text(f"<!doctype html><meta charset=utf-8><body style='margin:0'>{body}", encoding="utf-8")
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        flags += [
            f"--window-size={layout.width or WIDTH},{layout.height or HEIGHT}",
            "--virtual-time-budget=8000",
            f"--screenshot={path}",
        ]
        done = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    if not path.exists():
        raise RuntimeError(f"expected a picture from {browser}, got none: {done.stderr[-500:]}")


def names() -> list[str]:
    """Tutorials that have a figure."""
    return sorted(p.stem for p in HERE.glob("*.py") if "\ndef figure(" in p.read_text(encoding="utf-8"))


def main(chosen: Sequence[str] = ()) -> None:
    """Run tutorials at full scale, say what they found, and draw them."""
    for name in chosen or names():
        tutorial = importlib.import_module(name)
        with tempfile.TemporaryDirectory() as folder:
            result = tutorial.main(Path(folder))
        print(f"{name}: {result.sentence}", flush=True)
        write(tutorial.figure(result), FIGURES / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
