"""From a folder of records to what the user reads: the answer, a prediction, the page."""

from __future__ import annotations

import dataclasses
import shlex
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from towtank.cli.main import ENVIRONMENT, OK, REFUSED, RUNS_FAILED
from towtank.cli.output import console, print_json, say
from towtank.record.errors import ConfigError, FolderError
from towtank.record.record import Record
from towtank.study.folder import StudyFolder

if TYPE_CHECKING:
    from towtank.report.answer import Answer
    from towtank.study.config import Study


def report(folder: Path, json: bool, *, open_page: bool = False, damaged: int = 0, **extra: Any) -> int:
    """Answer the study of a folder, write its page, show the answer.

    Args:
        folder: the study's folder.
        json: print JSON in place of text.
        open_page: show the page in a browser.
        damaged: records that a sweep has already set aside.
        extra: what else the JSON says.

    Returns:
        The exit code.
    """
    from towtank.report.page import write_report

    answer, problems, warnings = make_answer(StudyFolder(folder))
    page = _written(write_report, answer, folder / "report.html")
    code = exit_code(answer, damaged + len(problems))
    if json:
        print_json("report", folder=str(folder), report=str(page), exit_code=code, **extra, answer=answer)
    else:
        from towtank.report.terminal import show_answer

        show_answer(answer, console())
    for warning in warnings:
        say(f"warning: {warning}")
    say(f"report: {page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
    return code


def predict(folder: Path, sizes: dict[str, float | None], json: bool) -> int:
    """Show what each arm of a folder says about one size; returns the exit code.

    Raises:
        ConfigError: unless exactly one size is given, of a key the runs have.
    """
    from towtank.report.answer import predict as predict_size
    from towtank.report.grouping import size_axis

    records, problems = _records(StudyFolder(folder))
    study, unread = _study(StudyFolder(folder))
    axis, value = _asked_size(sizes, study.size if study else size_axis(records), records)
    predictions = predict_size(records, value, size_axis=axis)
    warnings = [*problems, *unread]
    for warning in warnings:
        say(f"warning: {warning}")
    if json:
        print_json(
            "predict", folder=str(folder), size_axis=axis, size=value, predictions=predictions, warnings=warnings
        )
    else:
        from towtank.report.terminal import show_predictions

        show_predictions(predictions, console(), size_axis=axis)
    if problems:
        return ENVIRONMENT
    refused = not predictions or any(p.verdict.status == "refuse" for p in predictions)
    return REFUSED if refused else OK


def make_answer(folder: StudyFolder) -> tuple[Answer, list[str], list[str]]:
    """The answer of a folder's records, what is wrong with the records, and all to warn of.

    Raises:
        FolderError: if it holds no records.
    """
    from towtank.report.answer import answer

    records, problems = _records(folder)
    study, unread = _study(folder)
    warnings = [*problems, *unread]
    made = answer(
        records,
        study=study.name if study else records[0].study,
        question=study.question if study else "",
        size_axis=study.size if study else None,
        target=study.verify.target if study and study.verify else None,
        warnings=warnings,
    )
    if made.reproduce or not study:
        return made, problems, warnings
    path = shlex.quote(str(folder.path))
    commands = (f"towtank sweep {path}/study.toml --out {path}", f"towtank report {path}")
    return dataclasses.replace(made, reproduce=commands), problems, warnings


def exit_code(answer: Answer, damaged: int = 0) -> int:
    """What an answer means to the caller: damaged records first, then failed runs, then the verdict."""
    if damaged:
        return ENVIRONMENT
    if answer.counts.get("failed", 0) or answer.counts.get("oom", 0):
        return RUNS_FAILED
    failed = any(arm.verification is not None and arm.verification.held is False for arm in answer.arms)
    return REFUSED if failed or answer.verdict.status == "refuse" else OK


def _records(folder: StudyFolder) -> tuple[list[Record], list[str]]:
    records, problems = folder.load()
    if not records:
        more = f" ({len(problems)} damaged, the first: {problems[0]})" if problems else ""
        raise FolderError(f"{folder.path}: expected at least one record in records/{more}")
    return records, problems


def _study(folder: StudyFolder) -> tuple[Study | None, list[str]]:
    """The study of a folder, and what is wrong with its file; the records answer without it."""
    try:
        return folder.study(), []
    except ConfigError as error:
        return None, [f"{error}; answered from the records alone"]


def _asked_size(sizes: dict[str, float | None], own: str, records: list[Record]) -> tuple[str, float]:
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise ConfigError("size", f"exactly one of --{', --'.join(sizes)}")
    name, value = next(iter(given.items()))
    axis = own if name == "size" else name
    if not 0 < value < float("inf"):
        raise ConfigError(f"--{name}", "a positive number", value=value)
    if not any(axis in record.config for record in records):
        raise ConfigError(f"--{name}", f"a key of the runs; their size is {own}", value=value)
    return axis, value


def _written(write: Any, answer: Answer, page: Path) -> Path:
    try:
        return write(answer, page)
    except OSError as error:
        raise FolderError(f"{page}: expected a file that can be written, got: {error.strerror or error}") from None
