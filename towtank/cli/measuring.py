"""The commands `measure` and `landscape`: the curvature of a model that a function of the user makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from towtank.cli.main import OK, REFUSED
from towtank.cli.output import console, print_json, say
from towtank.record.errors import ConfigError, FolderError, plain

if TYPE_CHECKING:
    from rich.console import Console

    from towtank.curvature.measure import Measurement, Reading

_PARTS = ("model", "loss", "data", "optimizer")


def measure(target: str, *, top: int, rtol: float, seed: int, json: bool) -> int:
    """Measure what a function makes; returns the exit code, 1 if a quantity could not be measured."""
    from towtank.curvature.measure import measure as run

    model, given = made_by(target)
    found = run(model, **given, top=top, rtol=rtol, generator=seed)
    code = REFUSED if any(r.verdict.status == "refuse" for r in found.readings) else OK
    if json:
        print_json("measure", target=target, exit_code=code, **found.to_json())
    else:
        _show(found, console())
    return code


def landscape(
    target: str, *, kind: str, dims: int, span: float | None, points: int, out: Path | None, seed: int, json: bool
) -> int:
    """Draw the loss around what a function makes; returns the exit code.

    Raises:
        ConfigError: if an option does not fit.
        FolderError: if the figure cannot be written.
    """
    from towtank.curvature.landscape import landscape as run

    if kind not in ("filter", "random", "eigen"):
        raise ConfigError("--kind", "filter, random or eigen", value=kind)
    if span is not None and not 0 < span < float("inf"):
        raise ConfigError("--span", "a positive number", value=span)
    model, given = made_by(target)
    given.pop("optimizer", None)
    found = run(model, **given, kind=kind, dims=dims, span=span, points=points, generator=seed)  # type: ignore[arg-type]
    page = out or (None if json else Path("landscape.html"))
    if page:
        try:
            found.figure().write_html(page, include_plotlyjs=True)
        except OSError as error:
            raise FolderError(f"{page}: expected a file that can be written, got: {error.strerror or error}") from None
        say(f"figure: {page}")
    if json:
        print_json("landscape", target=target, figure=str(page) if page else None, **found.to_json())
    else:
        lowest = min((v for row in found.loss for v in row if v == v), default=float("nan"))
        console().print(Text(plain(f"loss {found.centre:.5g} at the model, lowest on the slice {lowest:.5g}")))
    return OK


def made_by(target: str) -> tuple[Any, dict[str, Any]]:
    """What a function makes: the model (or a Problem), and loss, data, optimizer and options of a Problem by name.

    Args:
        target: `package.module:function`.

    Raises:
        ConfigError: if there is no such function, or it returns something else.
    """
    from towtank.problem import Problem
    from towtank.study.keys import task_function

    try:
        function = task_function(target)
    except ConfigError as error:
        raise ConfigError("TARGET", error.expected, value=error.value, nearest=error.nearest) from error.__cause__
    made = function()
    if isinstance(made, Problem):
        return made, {}
    if isinstance(made, tuple) and made and isinstance(made[0], Problem) and len(made) == 2:
        return made[0], {"optimizer": made[1]}
    if isinstance(made, tuple) and len(made) in (3, 4):
        made = dict(zip(_PARTS, made, strict=False))
    if not isinstance(made, Mapping) or not set(_PARTS[:3]) <= set(made):
        kind = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ConfigError(
            "TARGET",
            f"a function that returns (model, loss, data), with an optimizer or not; it returned {kind}",
            value=target,
        )
    given = {str(k): v for k, v in made.items()}
    return given.pop("model"), given


def _show(found: Measurement, to: Console) -> None:
    to.print(Text(plain(found.convention)))
    if to.width < 90:
        for reading in found.readings:
            to.print(Text(plain(f"{reading}{f' ({_said(reading)})' if _said(reading) else ''}")))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name, side in (
        ("quantity", "left"),
        ("value", "right"),
        ("products", "right"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for r in found.readings:
        refused = r.verdict.status == "refuse"
        cost = [f"{r.products:.4g}" if r.products else "", f"{r.time_s:.2f} s" if r.time_s else ""]
        table.add_row(r.name, "-" if refused else r.shown(), *cost, Text(plain(_said(r))))
    to.print(table)


def _said(reading: Reading) -> str:
    parts = (reading.note, reading.verdict.reason if reading.verdict.status != "ok" else "")
    return "; ".join(dict.fromkeys(p for p in parts if p))
