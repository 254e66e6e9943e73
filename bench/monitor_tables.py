"""Shares of time, and the tables of `bench/monitor.py` in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much longer a loop took than the bare one, as a share of the bare one's time.

    Args:
        mean: of the sums over rounds.
        error: its standard error.
        median: of the rounds' own shares, between which are `low` and `high`, their quartiles.
    """

    mean: float
    error: float
    median: float
    low: float
    high: float


def share(own: Sequence[float], bare: Sequence[float]) -> Share:
    """Compare rounds that took turns.

    Args:
        own: seconds of each round.
        bare: of the bare loop's.
    """
    ratio, n = sum(own) / sum(bare), len(own)
    off = [x - ratio * b for x, b in zip(own, bare, strict=True)]
    error = math.sqrt(sum(d * d for d in off) / max(n - 1, 1) / n) / statistics.fmean(bare) if n > 1 else math.nan
    each = [x / b - 1 for x, b in zip(own, bare, strict=True)]
    low, median, high = statistics.quantiles(each, n=4, method="inclusive") if n > 1 else each * 3
    return Share(mean=ratio - 1, error=error, median=median, low=low, high=high)


def percent(found: dict[str, float] | None) -> str:
    """A share with its standard error, in percent."""
    if not found:
        return ""
    error = f" ± {100 * found['error']:.1f}" if math.isfinite(found["error"]) else ""
    return f"{100 * found['mean']:.1f}{error}"


def verdict(value: float, goal: float | None, error: float = 0.0) -> str:
    """Whether a goal is met, and whether two standard errors leave that open."""
    if goal is None:
        return ""
    open_ = ", within noise" if abs(value - goal) < 2 * error else ""
    return f"{'met' if value <= goal else 'missed'} ({goal:.0%}){open_}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; columns but the first two are right aligned, and texts in the last one left."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * (len(head) - 3) + "---|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value: float | None, digits: int = 1) -> str:
    """A number with some decimals, or nothing."""
    return short(value, f".{digits}f")


def short(value: float | None, form: str) -> str:
    """A number in a format, or nothing."""
    return "" if value is None or not math.isfinite(value) else format(value, form)


def tables(found: dict[str, Rows], first: int) -> str:
    """All tables in Markdown."""
    times = []
    for r in found["times"] + found["peer"]:
        level = r.get("settled")
        quartiles = (
            f"{100 * level['median']:.1f} ({100 * level['low']:.1f} to {100 * level['high']:.1f})" if level else ""
        )
        note = r.get("note", "") or (verdict(level["mean"], r.get("goal"), level["error"]) if level else "")
        dear = sum(r.get("dear_runs", {}).values())
        times.append(
            [
                r["case"], r["loop"], r.get("steps", r.get("turns", "")), number(r.get("step_ms")), percent(r.get("first")),
                percent(r.get("all")), percent(level), quartiles, percent(r.get("wall")), dear or "", note,
            ]
        )  # fmt: skip
    settled = f"after {first} %"
    parts = [
        "### Time\n",
        markdown(
            ["case", "watched by", "steps", "CPU ms a step", f"first {first} %", "all %", settled, "rounds: median (quartiles) %",
             "wall %", "dear runs", "goal"], times,
        ),
        "\n### Probes\n",
        markdown(
            ["case", "probe", "runs", "CPU ms a run", "gradients a run", "told", "% of the loop", "cadence"],
            [
                [
                    r["case"], r["probe"], r.get("runs", ""), number(r.get("run_ms")), number(r.get("run_gradients"), 2),
                    number(r.get("told")), number(100 * r["share"], 2), r.get("cadence", ""),
                ]
                for r in found["probes"]
            ],
        ),
        "\n### Budgets\n",
        markdown(
            ["case", "watched by", "budget %", "monitor's clock: all %", "measured: all, wall %", "all, CPU %", "dear runs"],
            [
                [
                    r["case"], r["loop"], number(100 * r["budget"]), number(100 * r["clock"]), number(100 * r["wall_all"]),
                    percent(r["all"]), ", ".join(f"{k} {n}" for k, n in r["dear_runs"].items()),
                ]
                for r in found["times"] if "clock" in r
            ],
        ),
        "\n### Memory\n",
        markdown(
            ["case", "watched by", "MiB at the peak", "over nobody %", "goal"],
            [
                [r["case"], r["loop"], number(r.get("mib")), number(100 * r.get("over", math.nan)),
                 r.get("note", "") or verdict(r["over"], r["goal"])]
                for r in found["memory"]
            ],
        ),
        "\n### Values\n",
        markdown(
            ["quantity (mlp)", "by", "value", "error", "stated", "CPU s", ""],
            [
                [
                    r["quantity"], r["who"], short(r.get("value"), ".6g"), short(r.get("error"), ".1e"),
                    short(r.get("stated"), ".1e"), number(r.get("cpu_s"), 2), r.get("note", ""),
                ]
                for r in found["values"]
            ],
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def remarks(found: dict[str, Rows]) -> str:
    """What monitors said, and whether they changed anything."""
    lines = [f"- {r['case']}: ends with other parameters than the bare loop: {r['differing']}" for r in found["same"]]
    for r in found["times"]:
        lines += [f"- {r['case']}, {r['loop']}, alarm: {text}" for text in r.get("alarms", ())]
        lines += [f"- {r['case']}, {r['loop']}, note: {text}" for text in r.get("notes", ())]
    return "\n".join(lines)
