"""The commands `fit` and `laws`: from a table of anybody's runs to a law, its forecast and its page."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from towtank.cli.asking import Request, find_law, hold_out_of, variables_of, words_of
from towtank.cli.main import ENVIRONMENT, OK, REFUSED
from towtank.cli.output import console, print_json, say
from towtank.record.errors import ConfigError, FolderError, nearest

if TYPE_CHECKING:
    from towtank.laws.law import Law
    from towtank.laws.schedules import Schedule
    from towtank.report.fit_answer import FitAnswer

RUN = "run"  # what exports of runs call the column that names them
CURVE = {"step", "lr"}  # variables of the laws of loss curves


def laws(json: bool) -> int:
    """List the laws; returns the exit code."""
    from towtank.laws import LAWS

    if json:
        keys = ("name", "formula", "variables", "needs", "source")
        print_json("laws", laws=[{key: getattr(law, key) for key in keys} for law in LAWS])
        return OK
    from towtank.report.terminal import say as tell

    for law in LAWS:
        tell(console(), f"{law.name}: {law.formula}", style="bold")
        tell(console(), f"  variables: {', '.join(f'{name} {what}' for name, what in law.variables.items())}")
        tell(console(), f"  needs: {law.needs}")
        tell(console(), f"  source: {law.source}")
    return OK


def fit(request: Request, json: bool) -> int:
    """Fit a law to a table, write its page, show what it says; returns the exit code.

    Raises:
        ConfigError: if what is asked does not go with the law or the table.
        FolderError: if the table cannot be read or the page not be written.
    """
    from towtank.report.fit_page import write_fit

    law = find_law(request.law)
    if set(law.variables) == CURVE and request.predict:
        raise ConfigError(
            "--predict",
            "a law of single rows; give the run to predict as rows of step and learning rate without a loss",
        )
    if set(law.variables) == CURVE:  # columns of the usual names, unless others are given
        given = {word.rpartition("=")[2] for word in request.x}
        x = [*request.x, *(f"{name}={name}" for name in law.variables if name not in given)]
        request = replace(request, x=x, columns={"groups": "curve", **request.columns})
    source, points = words_of(request, law)
    out = request.out or Path(f"{source.resolve().stem}.{law.name}.html")
    _check_writable(out)
    with _stages() as stage:
        stage(f"reading {source}")
        table, problems = load(source)
        kept = _kept(table, request, law)
        answer = _answer(request, law, kept, source=source, points=points, problems=problems, stage=stage)
        answer = replace(answer, warnings=tuple(_plainly(w) for w in answer.warnings))
        stage("writing the page")
        page = _written(write_fit, answer, out)
    if json:
        print_json("fit", page=str(page), exit_code=_exit_code(answer, problems), answer=answer)
    else:
        from towtank.report.fit_terminal import show_fit

        show_fit(answer, console())
    say(f"page: {page}")
    return _exit_code(answer, problems)


def _answer(
    request: Request, law: Law, kept: Kept, *, source: Path, points: list[dict[str, float]], problems: list[str],
    stage: Callable[[str], None],
) -> FitAnswer:  # fmt: skip
    """Fit, and everything that can be told of the fit.

    Raises:
        ConfigError: if the law cannot be asked this of the table.
    """
    from towtank.laws.curve_law import CurveLaw
    from towtank.report.fit_answer import Asked
    from towtank.report.fitted import answer_fit

    dropped = [f"{kept.dropped} rows with missing or infinite numbers left out"] if kept.dropped else []
    dropped += _runs(kept.table, law, request.columns)
    asked = Asked(
        law=law, table=source.name, columns=kept.x, y=request.y, predict=points, hold_out=hold_out_of(request.hold_out),
        rows=kept.rows, warnings=[*problems, *dropped], reproduce=shlex.join(["towtank", *sys.argv[1:]]), stage=stage,
    )  # fmt: skip
    stage("fitting")
    try:
        if isinstance(law, CurveLaw):
            curves, known, asked_for = curves_of(kept, request)
            return answer_fit(law.fit_curves(curves, schedules=known, seed=request.seed), asked, asked_for)
        fitted = law.fit(kept.table, x=_asked_x(kept.x), y=request.y, seed=request.seed, **_taken(law, request.columns))
        return answer_fit(fitted, asked)
    except ConfigError:
        raise
    except ValueError as error:
        said = _plainly(str(error)).removeprefix("expected ")
        among = " among those that are kept" if kept.rows is not None else ""
        raise ConfigError(str(source), said + f" (rows are counted from 0{among})" * ("row" in said)) from None


def curves_of(kept: Kept, request: Request) -> tuple[dict[str, Any], dict[str, Schedule], dict[str, Schedule]]:
    """Loss curves by name, the schedules of those with rows that have no loss, and of those without any loss.

    A row without a loss still tells the learning rate at its step; a run without any loss is one to predict.
    """
    from towtank.laws.schedules import from_samples

    step, rate, loss = (_numbers(kept.table, name) for name in (kept.x["step"], kept.x["lr"], request.y))
    names = np.array([str(v) for v in kept.table[request.columns["groups"]]])
    curves, known, asked_for = {}, {}, {}
    for name in dict.fromkeys(names):
        mine = np.flatnonzero((names == name) & np.isfinite(step) & np.isfinite(rate))
        mine = mine[np.argsort(step[mine], kind="stable")]
        measured = mine[np.isfinite(loss[mine])]
        if measured.size:
            curves[str(name)] = np.stack([step[measured], rate[measured], loss[measured]], axis=1)
        if measured.size < mine.size:
            runs = known if measured.size else asked_for
            runs[str(name)] = from_samples(step[mine].astype(np.int64), rate[mine])
    return curves, known, asked_for


def _asked_x(columns: dict[str, str]) -> str | dict[str, str]:
    """One column as its name, which is all that the laws of one size take."""
    return next(iter(columns.values())) if len(columns) == 1 else columns


def _taken(law: Law, columns: Mapping[str, str]) -> dict[str, str]:
    """The other columns, if the law takes them.

    Raises:
        ConfigError: if it does not.
    """
    known = inspect.signature(law.fit).parameters
    for name, column in columns.items():
        if name not in known:
            raise ConfigError(f"--{name}", f"a law that takes it, which {law.name} does not", value=column)
    return dict(columns)


def _runs(table: Mapping[str, Any], law: Law, columns: Mapping[str, str]) -> list[str]:
    """Rows of one run are not independent: said where a column names the runs and nobody said to group by it."""
    if RUN not in table or "groups" in columns or "groups" not in inspect.signature(law.fit).parameters:
        return []
    rows, runs = len(table[RUN]), len({str(v) for v in table[RUN]})
    if runs == rows:
        return []
    return [
        f"{rows:,} rows of {runs:,} runs taken as independent, so the intervals are too narrow; give --groups {RUN}"
    ]


def _exit_code(answer: FitAnswer, problems: Sequence[str]) -> int:
    refused = answer.verdict.status == "refuse" or any(f.verdict.status == "refuse" for f in answer.forecasts)
    return ENVIRONMENT if problems else REFUSED if refused else OK


def load(source: Path) -> tuple[dict[str, Any], list[str]]:
    """The table in a file or in the folder of a sweep, and what is wrong with its records.

    Raises:
        FolderError: if it cannot be read.
    """
    from towtank.laws.read import columns_of, read_table

    if not (source / "records").is_dir():
        try:
            return read_table(source), []
        except ValueError as error:
            raise FolderError(str(error)) from None
    from towtank.study.folder import StudyFolder
    from towtank.study.rows import rows_of

    records, problems = StudyFolder(source).load()
    table = columns_of(rows_of(records))
    if not table:
        raise FolderError(f"{source}: expected runs that finished or diverged, got none")
    return table, problems


@dataclass(frozen=True)
class Kept:
    """The rows that are fitted.

    Args:
        table: columns by name.
        x: column of each variable.
        rows: number of every row in the source; None if all are kept.
        dropped: how many were dropped for missing numbers.
    """

    table: dict[str, Any]
    x: dict[str, str]
    rows: list[int] | None
    dropped: int


def _kept(table: dict[str, Any], request: Request, law: Law) -> Kept:
    """The rows that are asked for.

    Raises:
        ConfigError: if there are none, or a condition cannot be read.
    """
    from towtank.laws.read import rows as rows_where
    from towtank.laws.read import select

    x, number, count = variables_of(request.x, law), "\0row", len(next(iter(table.values())))
    try:
        chosen = select(table | {number: list(range(count))}, request.where)
    except ValueError as error:
        raise ConfigError("--where", str(error).removeprefix("expected ")) from None
    for option, column in [*(("x", c) for c in x.values()), ("y", request.y), *request.columns.items()]:
        if column not in chosen:
            raise ConfigError(f"--{option}", "a column of the table", value=column, nearest=nearest(column, chosen))
    used = [*x.values(), request.y, *([request.columns["weights"]] if "weights" in request.columns else [])]
    finite = np.all([np.isfinite(_numbers(chosen, name)) for name in used], axis=0)
    dropped = int((~finite).sum()) if request.drop else 0
    if dropped:
        chosen = rows_where(chosen, finite)
    rows = chosen.pop(number)
    if not rows:
        raise ConfigError(
            "--where", f"conditions that some of the {count} rows meet, got none", value=list(request.where)
        )
    return Kept(chosen, x, rows if len(rows) < count else None, dropped)


def _numbers(table: Mapping[str, Any], name: str) -> Any:
    """A column as numbers; what is missing is NaN.

    Raises:
        ConfigError: if it is a column of texts.
    """
    from towtank.laws.table import column

    try:
        return column(table, name)
    except (TypeError, ValueError):
        row = next(i for i, v in enumerate(table[name]) if isinstance(v, str))
        raise ConfigError(f"{name} in row {row}", "a number", value=table[name][row]) from None


def _plainly(said: str) -> str:
    """What a law says to those who call it from Python, in the words of the command line."""
    said = said.replace("leave them out with drop=True", "leave them out with --drop-nan")
    return said.replace("give schedules=", "add rows of step and learning rate without a loss")


def _check_writable(out: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ConfigError("--out", "a file in a folder that is there", value=str(out))


def _written(write: Callable[[Any, Path], Path], answer: Any, out: Path) -> Path:
    try:
        return write(answer, out)
    except OSError as error:
        raise FolderError(
            f"{out}: expected a file that can be written, got: {error.strerror or error}; give --out"
        ) from None


@contextmanager
def _stages() -> Generator[Callable[[str], None]]:
    """Tells on a terminal what is going on; says nothing where the error stream is no terminal."""
    from towtank.study.progress import is_live

    if not is_live(sys.stderr):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(file=sys.stderr).status("starting") as status:
        yield lambda name: status.update(escape(name))
