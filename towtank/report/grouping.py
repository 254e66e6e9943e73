"""Which runs belong together: the size axis, the arms, and what each run measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from towtank.estimate import finite
from towtank.record.record import Record

ATTENTION = "attention_logit_max"
FITTED_STATUS = ("done", "diverged")
_MISSING = "(not set)"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in learning rate, seed, size and stage.

    Args:
        name: what tells this arm from the others, in words.
        settings: the keys that do, and their values.
        records: its runs, those without a learning rate or a size left out.
    """

    name: str
    settings: dict[str, object]
    records: tuple[Record, ...]


def size_axis(records: Iterable[Record]) -> str:
    """The key along which the runs grow: width or depth if it varies, else the only integer key that varies.

    Example:
        >>> from towtank.record.record import Loss
        >>> def run(n):
        ...     return Record(id=str(n), config={"lr": 0.1, "hidden": n}, status="done", steps=1, loss=Loss())
        >>> size_axis([run(8), run(16)])
        'hidden'
    """
    values = _values(records)
    varying = [key for key, seen in values.items() if len(seen) > 1]
    for key in ("width", "depth"):
        if key in varying:
            return key
    others = [key for key in varying if key not in ("lr", "seed", "corpus")]
    whole = [key for key in others if all(map(_is_size, seen_values(values[key])))]
    if len(whole) == 1:
        return whole[0]
    return next((key for key in ("width", "depth") if key in values), "size")


def split(records: Sequence[Record], axis: str) -> tuple[Group, ...]:
    """Arms: every key that varies, and is neither learning rate, seed nor size, tells them apart; so does the corpus."""
    usable = [r for r in records if usable_config(r, axis)]
    values = _values(usable)
    keys = sorted(key for key, seen in values.items() if len(seen) > 1 and key not in ("lr", "seed", axis))
    arms = _by(keys, usable)
    for key in ("beta1", "beta2", "eps"):  # an optimizer's own numbers tell nothing that its name does not
        rest = [k for k in keys if k != key]
        if key in keys and "optimizer" in keys and len(fewer := _by(rest, usable)) == len(arms):
            keys, arms = rest, fewer
    groups = []
    for members in arms.values():
        settings = {key: _settings(members[0]).get(key, _MISSING) for key in keys}
        members.sort(key=lambda r: (size_of(r, axis), rate_of(r), seed_of(r), r.stage, r.id))
        groups.append(Group(_name(settings), settings, tuple(members)))
    return tuple(sorted(groups, key=lambda g: g.name))


def _by(keys: Sequence[str], records: Iterable[Record]) -> dict[tuple[object, ...], list[Record]]:
    """Records by their values of some keys."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(_hashable(_settings(record).get(key, _MISSING)) for key in keys), []).append(record)
    return found


def shared(records: Iterable[Record]) -> dict[str, object]:
    """Settings that all runs share."""
    records = list(records)
    values = _values(records)
    return {
        key: seen_values(seen)[0]
        for key, seen in sorted(values.items())
        if len(seen) == 1 and key != "corpus" and all(key in r.config for r in records)
    }


def joined(mappings: Iterable[Mapping[str, object]]) -> dict[str, object]:
    """Values by key; where they differ, all of them in one text.

    Example:
        >>> joined([{"torch": "2.13", "device": "cpu"}, {"torch": "2.13", "device": "cuda"}])
        {'device': 'cpu, cuda', 'torch': '2.13'}
    """
    seen: dict[str, set[object]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            seen.setdefault(key, set()).add(value)
    return {k: next(iter(v)) if len(v) == 1 else ", ".join(sorted(map(str, v))) for k, v in sorted(seen.items())}


def usable_config(record: Record, axis: str) -> bool:
    """Whether a run has a positive learning rate and size."""
    lr = record.config.get("lr")
    return _positive(lr) and (axis not in record.config or _positive(record.config[axis]))


def size_of(record: Record, axis: str) -> float:
    """The size of a run; 1 if its configuration has no such key."""
    return float(record.config.get(axis, 1.0) or 1.0)


def rate_of(record: Record) -> float:
    """The learning rate of a run."""
    return float(record.config["lr"] or 0.0)


def seed_of(record: Record) -> int:
    """The seed of a run; 0 if it has none."""
    return int(record.config.get("seed") or 0)


def loss_of(record: Record) -> float | None:
    """The final loss of a run; None if it diverged."""
    return record.loss.final if record.status == "done" and finite(record.loss.final) else None


def logit_of(record: Record) -> float | None:
    """The largest attention logit over training and blocks; None if none was recorded."""
    values = [v for _, v in record.signals.get(ATTENTION, []) if v is not None and finite(v)]
    return max(values, default=None)


def seen_values(seen: set[tuple[bool, object]]) -> list[object]:
    """The values behind their hashable forms."""
    return [value for _, value in seen]


def _settings(record: Record) -> dict[str, object]:
    return {**record.config, "corpus": record.corpus}


def _values(records: Iterable[Record]) -> dict[str, set[tuple[bool, object]]]:
    records = list(records)
    keys = dict.fromkeys(key for r in records for key in _settings(r))
    return {key: {_hashable(_settings(r).get(key, _MISSING)) for r in records} for key in keys}


def _hashable(value: object) -> tuple[bool, object]:
    return isinstance(value, bool), value  # True is not 1


def _is_size(value: object) -> bool:
    return _positive(value) and float(value) == int(value)  # type: ignore[arg-type]


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _name(settings: Mapping[str, object]) -> str:
    if not settings:
        return "all runs"
    words = {key for key, value in settings.items() if isinstance(value, str) and value and key != "corpus"}
    return ", ".join(str(v) if key in words else f"{key}={str(v)[:12]}" for key, v in settings.items())
