"""The command `optimizers`: what each rule costs, where it is from, and where it differs from its paper or its code."""

from __future__ import annotations

import re
from typing import Any

from towtank.cli.main import OK
from towtank.cli.output import console, print_json
from towtank.optim import OPTIMIZERS, rule_of
from towtank.record.errors import ConfigError, nearest

_HEAD = ("optimizer", "state B", "passes", "lr / AdamW", "paper", "deviations")
NOTES = (
    "state B: bytes of state per float32 parameter of a matrix; passes: extra forward and backward passes a step; "
    "lr / AdamW: its usual learning rate as a multiple of AdamW's; deviations: how many are known, from the paper, the "
    "official code and popular collections. `towtank optimizers NAME` tells them."
)


def optimizers(name: str | None, json: bool) -> int:
    """List the optimizers, or tell all about one; returns the exit code.

    Raises:
        ConfigError: for an unknown name.
    """
    by_case = {known.casefold(): known for known in OPTIMIZERS}
    if name is not None and name.casefold() not in by_case:
        raise ConfigError("NAME", "an optimizer's name", value=name, nearest=nearest(name, OPTIMIZERS))
    found = [facts(known) for known in (OPTIMIZERS if name is None else [by_case[name.casefold()]])]
    if json:
        print_json("optimizers", optimizers=found)
    elif name is None:
        _show_all(found)
    else:
        _show_one(found[0])
    return OK


def facts(name: str) -> dict[str, Any]:
    """What a reader should know of an optimizer, by its public name.

    Example:
        >>> facts("Lion")["state_bytes"]
        4
    """
    rule = rule_of(name)
    return {
        "name": name,
        "summary": rule.summary,
        "source": rule.source,
        "state_bytes": rule.state_bytes,
        "extra_passes": rule.passes,
        "curvature": rule.curvature,
        "lr_vs_adamw": rule.lr_vs_adamw,
        "defaults": rule.hyper()._asdict(),
        "weight_decay": rule.weight_decay,
        "decay": rule.decay,
        "reach": rule.reach,
        "variants": list(rule.variants),
        "deviations": rule.deviations,
    }


def _show_all(found: list[dict[str, Any]]) -> None:
    from towtank.report.tables import Cell, Table
    from towtank.report.terminal import say, show_table

    rows = [
        (
            Cell(f["name"]), Cell(f"{f['state_bytes']:g}", f["state_bytes"]), Cell(f"{f['extra_passes']:g}", f["extra_passes"]),
            Cell(_range(f)), Cell(_paper(f["source"])), Cell(str(len(f["deviations"])), len(f["deviations"])),
        )
        for f in found
    ]  # fmt: skip
    show_table(console(), "Optimizers of towtank.optim", Table(_HEAD, tuple(rows)))
    say(console(), NOTES, limit=600, blank=True)


def _show_one(f: dict[str, Any]) -> None:
    from towtank.report.terminal import say

    out = console()
    say(out, f"{f['name']}: {f['summary']}", style="bold")
    say(out, f"  source: {f['source']}")
    say(
        out,
        f"  state: {f['state_bytes']:g} bytes per float32 parameter of a matrix; extra passes a step: {f['extra_passes']:g}",
    )
    say(out, f"  learning rate: {_range(f)} times AdamW's")
    say(out, f"  defaults: {', '.join(f'{k} {v:g}' for k, v in f['defaults'].items())}")
    say(out, f"  weight decay: {f['weight_decay']:g}, {f['decay']}")
    if f["curvature"]:
        say(out, f"  curvature: needs observe_curvature() with {f['curvature']} samples")
    if f["variants"]:
        say(out, f"  variants: {', '.join(f['variants'])}")
    for deviation in f["deviations"] or ["none known"]:
        say(out, f"  deviation: {deviation}", limit=600)


def _range(f: dict[str, Any]) -> str:
    low, high = f["lr_vs_adamw"]
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _paper(source: str) -> str:
    """Authors and year of the first source."""
    named = re.match(r".*?\d{4}", source)
    return re.sub(r", .* and \w+", " et al.", named.group()) if named else source
