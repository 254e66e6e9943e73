"""Rules at work: what they raise, once an episode, and what is done about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from towtank.signals.alarm import Alarm, Stop
from towtank.signals.history import History
from towtank.signals.rules import Limit, Rule
from towtank.signals.step import FAILURES, CannotTell, Step

Action = Literal["log", "stop"] | Callable[[Alarm], Any]
QUIET = 100  # steps after which an alarm that had ended is raised again
_LOG = logging.getLogger("towtank")


class Judge:
    """Asks the rules after every step, and passes on what is new.

    Args:
        rules: what raises alarms.
        actions: what is done about one, or {name of the alarm: what is done}, with "" for the others.

    Raises:
        ValueError: if an action is unknown.

    Example:
        >>> import torch
        >>> rule = Limit(name="hot", key="t", limit=10.0, message="at {value}", suggestion="cool", source="us")
        >>> judge, history = Judge([rule], "log"), History()
        >>> step = Step(number=1, loss=torch.zeros(()), model=torch.nn.Identity())
        >>> history.add(1, {"t": 12.0})
        >>> len(judge.news(history, step, print)), len(judge.news(history, step, print))
        (1, 0)
    """

    def __init__(self, rules: Iterable[Rule], actions: Action | Mapping[str, Action]) -> None:
        self.rules = tuple(rules)
        self.actions: Mapping[str, Action] = actions if isinstance(actions, Mapping) else {"": actions}
        for action in self.actions.values():
            if action not in ("log", "stop") and not callable(action):
                raise ValueError(f'expected "log", "stop" or a function as action, got {action!r}')
        self._open: dict[tuple[str, str, str], bool] = {}  # episodes, and whether they have ended
        self._seen: dict[tuple[str, str, str], int] = {}  # when they were last seen

    def news(self, history: History, step: Step, note: Callable[[str, str], None]) -> list[Alarm]:
        """Alarms of a step that are not going on already; one that becomes critical is news.

        Args:
            history: with the readings of the step.
            step: the step.
            note: takes the name and the words of a rule that cannot tell.
        """
        found: list[Alarm] = []
        for rule in self.rules:
            try:
                found += rule(history, step) or ()
            except CannotTell as reason:
                note(_name(rule), " ".join(str(reason).split()))
            except FAILURES as error:  # whatever is wrong with a rule, the training goes on
                note(_name(rule), f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        news = [alarm for alarm in found if self._is_news(alarm)]
        raised = {_episode(alarm) for alarm in found}
        for episode, key in [(e, e[1]) for e in self._open if e not in raised]:
            self._open[episode] |= any(history.updated(step.number, key))  # a reading that is well ends it
        return news

    def _is_news(self, alarm: Alarm) -> bool:
        episode = _episode(alarm)
        goes_on = episode in self._open and not self._open[episode]
        recent = alarm.step - self._seen.get(episode, -QUIET - 1) <= QUIET
        self._open[episode], self._seen[episode] = False, alarm.step
        return not (goes_on or recent)

    def doubtful(self, history: History, keys: Iterable[str]) -> bool:
        """Whether one of these readings is beyond a limit, but must be seen again before it is an alarm."""
        keys = set(keys)
        return any(rule.key in keys and rule.doubtful(history) for rule in self.rules if isinstance(rule, Limit))

    def unknown(self) -> list[str]:
        """What is odd about the names of actions: those that no rule says it raises."""
        known = {name for rule in self.rules for name in getattr(rule, "names", (getattr(rule, "name", ""),))}
        if not all(hasattr(rule, "names") or hasattr(rule, "name") for rule in self.rules):
            return []  # a rule of the user's may raise anything
        return [
            f"on_alarm names {name!r}, which no rule raises; there are {', '.join(sorted(known))}"
            for name in self.actions
            if name and name not in known
        ]

    @property
    def may_stop(self) -> bool:
        """Whether an alarm can end the training."""
        return any(action != "log" for action in self.actions.values())

    def act(self, alarms: Iterable[Alarm]) -> None:
        """Do what is asked about alarms.

        Raises:
            Stop: where that is "stop".
        """
        for alarm in alarms:
            action = self.actions.get(alarm.name, self.actions.get("", "log"))
            if callable(action):
                action(alarm)
                continue
            _LOG.warning("%s", alarm)
            if action == "stop":
                raise Stop(alarm)


def _name(rule: Rule) -> str:
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", None) or type(rule).__name__)


def _episode(alarm: Alarm) -> tuple[str, str, str]:
    return alarm.name, alarm.key, alarm.severity
