"""The monitor: probes at their cadence, alarms from rules, sinks for both; around anybody's loop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from towtank.problem import Problem
from towtank.problem.data import is_batch, is_mapping, target_key
from towtank.problem.forward import unwrapped
from towtank.record.lines import End
from towtank.signals import parallel
from towtank.signals.alarm import Alarm, Stop
from towtank.signals.cadence import Slot, attribute
from towtank.signals.capture import compiled, replay
from towtank.signals.checks import check_model, check_settings, innermost, misplaced
from towtank.signals.clock import Clock
from towtank.signals.defaults import default_probes, default_rules
from towtank.signals.history import History
from towtank.signals.judge import Action, Judge
from towtank.signals.plan import described, environment, plan, run_id
from towtank.signals.probe_batch import probe_data
from towtank.signals.readings import basics, floats, gradient_norm, numbers
from towtank.signals.recorder import Recorder
from towtank.signals.rules import Rule
from towtank.signals.sinks import JSONL, Sink, Sinks
from towtank.signals.spikes import spike
from towtank.signals.step import FAILURES, CannotTell, Need, NotRecorded, Probe, Step

SETTLED = 5  # plain steps that are timed before costs are judged


class Monitor:
    """Probes of every training step, and alarms before the loss shows what is wrong.

    Call `step` after the optimizer's step and before the gradients are cleared. Nothing of the training changes: hooks are set
    for single steps and removed after them, by `close`, at the end of a `with` block, and when the monitor is no longer
    referenced. A probe that fails does not end the training; what it said is in the notes.

    Args:
        model: the network; compiled and data-parallel wrappers are seen through.
        optimizer: that trains it; without one there is nothing about updates and learning rates.
        loss: `loss(outputs, targets)` -> mean, for what needs the loss again (curvature, single examples, blame). Models of
            Hugging Face with "labels" in their batches need none.
        out: folder of the run: `stream.jsonl` while it runs, `records/<id>.json` when it ends.
        probes: see `Probe`: functions of a step to numbers, `every(n, probe)`, `log_spaced(probe)`. Default: `default_probes`.
        rules: what raises alarms. Default: `default_rules`.
        every: steps between runs of cheap probes without a cadence of their own.
        budget: share of the time of the loop that the monitor may take. Dear probes (curvature, single examples) run once at
            the start, and again when their share has paid for it; cheap ones become rarer where they take more than all of it.
        on_alarm: "log" (to the logger "towtank", and the sinks), "stop" (`step` raises `Stop`), or a function of the alarm;
            or one of these by the name of the alarm, with "" for the others.
        sinks: further places for readings and alarms, see `towtank.signals.sinks`.
        probe_batch: the batch on which curvature is measured; by default the first one, of which a quarter where batch
            normalization couples its examples.
        scaler: the gradient scaler of float16 training; by default the one that Accelerate's optimizers carry.
        processes: how many processes average their gradients; by default those of the group, where the model is wrapped in
            `DistributedDataParallel`, else one.
        sync_every: steps between readings of the numbers from the device; by default 1 on a CPU and 10 elsewhere. Alarms come
            as late, and only a spike of the newest step can be attributed to its batch.
        config: settings to keep with the run: scalars by name.
        resume: whether a run of the same settings in `out` goes on; otherwise its stream is set aside and a new run begins.
        **options: of `Problem`: forward, weight, params, ... The mode is "train" unless given, as in the steps themselves:
            normalization by the batch; only single examples are measured in mode "eval" where a layer couples them.

    Attributes:
        history: readings by key, see `History`: `steps, values = monitor.history["grad/norm"]`.
        alarms: all that were raised.
        notes: (step, probe, text): what probes cannot tell, and what else there is to say, each once.
        status: "running", then how it ended.
        clock: what the loop and the monitor cost.

    Raises:
        TypeError: if an argument is of the wrong kind, or an option unknown.
        ValueError: if a number is out of range, or the optimizer is not one of the model's parameters.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 1)
        >>> with Monitor(model, optimizer, loss=F.mse_loss) as monitor:
        ...     for _ in range(3):
        ...         loss = F.mse_loss(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         alarms = monitor.step(loss, (x, y))
        ...         optimizer.zero_grad()
        >>> len(monitor.history["train/loss"][0]), alarms
        (3, ())
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Callable[..., Any] | None = None,
        out: Any = None,
        probes: Sequence[Probe] | None = None,
        rules: Sequence[Rule] | None = None,
        every: int = 10,
        budget: float = 0.05,
        on_alarm: Action | Mapping[str, Action] = "log",
        sinks: Iterable[Sink] = (),
        probe_batch: Any = None,
        scaler: Any = None,
        processes: int | None = None,
        sync_every: int | None = None,
        config: Mapping[str, Any] | None = None,
        resume: bool = False,
        **options: Any,
    ) -> None:
        inner, sinks = innermost(optimizer), list(sinks)
        check_model(model, inner)
        check_settings(every=every, budget=budget, loss=loss, probes=probes, rules=rules, sinks=sinks, options=options)
        self.model, self.optimizer, self.budget = unwrapped(model), inner, budget
        self.history, self.clock = History(), Clock()
        self.alarms: list[Alarm] = []
        self.notes: list[tuple[int, str, str]] = []
        self.number, self.status = 0, "running"
        self._loss, self._options = loss, {"checks": False, "mode": "train", **options}
        self._world, self._main = processes or parallel.world(model), parallel.rank() == 0
        self._said: set[tuple[str, str]] = set()
        found = default_probes(self.optimizer) if probes is None else probes
        self.slots = [self._slot(p, every) for p in found]
        self._judge = Judge(default_rules() if rules is None else rules, on_alarm)
        self._recorder = Recorder(self.model, self.optimizer, scaler or getattr(optimizer, "scaler", None))
        self._probe_batch = None if probe_batch is None else self._as_probe(probe_batch, given=True)
        self._kept: dict[str, Any] = {}
        self._pending: list[tuple[Step, dict[str, Any]]] = []
        cpu = next((p.device.type for p in self.model.parameters()), "cpu") == "cpu"
        self._sync_every = sync_every or (1 if cpu else 10)
        self._compiled = compiled(model)
        own: list[Sink] = []
        if out is not None and self._main:
            about = described(self.model, self.optimizer, loss) | dict(config or {})
            run = None if resume else run_id(about)
            own = [JSONL(out, config=about, environment=environment(), parameters=about["parameters"], id=run)]
        self._sinks = Sinks([*own, *(sinks if self._main else ())])
        for text in self._judge.unknown():
            self.note("monitor", text)
        self._norm: Tensor | None = None
        self._arm()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        stopped = kind is not None and issubclass(kind, Stop | KeyboardInterrupt)
        self.close("done" if kind is None else "stopped" if stopped else "failed")

    def step(self, loss: Tensor | float | None, batch: Any = None) -> tuple[Alarm, ...]:
        """Look at the step that the optimizer has just taken.

        Args:
            loss: of the step: a tensor or a number. With gradient accumulation, of its last part. None where the loop does not
                tell: there is then no "train/loss", and nothing that is judged by it.
            batch: of the step, as a `Problem` takes it: (inputs, targets), or a mapping.

        Returns:
            The alarms that it raised.

        Raises:
            RuntimeError: if the monitor is closed.
            Stop: where an alarm's action is "stop".
        """
        if self.status != "running":
            raise RuntimeError(f"expected a monitor that is running, got one that is {self.status}; make a new one")
        self.clock.enter(hooked=bool(self._due))
        self.number += 1
        with torch.no_grad():
            step = self._seen(loss, batch)
            readings = dict(basics(step, self._norm, told=loss is not None))
            due = [slot for slot in self.slots if slot in self._due or self._is_stale(slot, step)]
            told = {slot: self._run(slot, step) for slot in due if self._main or slot.fixed}
            for found in told.values():
                readings |= found
            step.memo.clear()  # graphs, and gradients of single examples
            raised = self._settle(step, readings) if self._main else ()
        for slot, found in told.items():
            if slot.dear and self._judge.doubtful(self.history, found):
                slot.credit_s = 0.0  # measured again at the next step, whatever it has been paid
        dear_s = sum(slot.last_s for slot in told if slot.dear)
        self.clock.leave(due=any(not slot.dear for slot in told), dear_s=dear_s)
        self._pay()
        self._arm()
        try:
            self._judge.act(raised)
        except Stop:
            self.close("stopped")
            raise
        return raised

    def note(self, probe: str, text: str) -> None:
        """Keep a remark of a probe, once."""
        said = (
            probe,
            re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text),
        )  # the same sentence with other numbers is no news
        if said in self._said:
            return
        self._said.add(said)
        self.notes.append((self.number, probe, text))
        self._sinks.note(self.number, probe, text)

    def plan(self) -> str:
        """What each probe costs and when it runs: expected costs in gradients of the probe batch, and measured seconds."""
        with suppress(CannotTell):
            return plan(self.slots, self.clock, self.budget, self._problem(self._probe_batch))
        return plan(self.slots, self.clock, self.budget, None)

    @property
    def may_stop(self) -> bool:
        """Whether an alarm can end the training."""
        return self._judge.may_stop

    def close(self, status: End = "done") -> None:
        """Remove what is left of hooks and close the sinks; closing twice does nothing.

        Args:
            status: how the run ended: "done", "stopped" or "failed"; it is "diverged" where the last loss was not finite.
        """
        if self.status != "running":
            return
        self._recorder.disarm()
        if self._main:
            self._flush()
        loss = self.history.last("train/loss")
        ended: End = "diverged" if loss is not None and not math.isfinite(loss) else status
        self.status = ended
        self._sinks.close(ended)

    # One step

    def _slot(self, probe: Probe, n: int) -> Slot:
        fixed = self._world > 1 and "micro" in attribute(probe, "needs", ())
        return Slot(probe, n=n, first=int(attribute(probe, "first", 1)), fixed=fixed)

    def _arm(self) -> None:
        """Decide which probes are due at the next step, and have recorded what they need."""
        self._due = [slot for slot in self.slots if slot.due(self.number + 1)]
        needs: set[Need] = {need for slot in self._due if self._main or slot.fixed for need in slot.needs}
        self._keep = [glob for slot in self._due for glob in attribute(slot.probe, "keep", ())]
        self._norm, self._looks = None, "seen" in needs
        if self._compiled:  # hooks would have it compiled anew; its batch is run again instead
            needs.discard("seen")
        self._recorder.arm(needs, self._keep, self._suspicious if self._sync_every == 1 and self._main else None)

    def _suspicious(self) -> bool:
        """Just before the optimizer's step: whether its gradient is a spike, so that the parameters before it are wanted."""
        self._norm = gradient_norm(self.model)
        past = self.history.tail("grad/norm", 200)
        if self._norm is None:
            return False
        value = float(self._norm)
        try:
            return math.isfinite(value) and spike(past, value, step=self.number, key="grad/norm") is not None
        except CannotTell:
            return False

    def _seen(self, loss: Tensor | float | None, batch: Any) -> Step:
        needs = self._recorder.needs
        recorded, moved = self._recorder.collect()
        if self._world > 1 and "micro" in needs:
            own = recorded.pop("micro", None)  # only a fixed probe runs in every process: otherwise nobody would answer
            parts = parallel.gathered(own) if any(slot.fixed for slot in self._due) else None
            recorded |= {"micro": parts} if parts else {}
        if self._probe_batch is None and batch is not None:
            self._probe_batch = self._as_probe(batch, given=False)
        step = Step(
            number=self.number,
            loss=torch.as_tensor(math.nan if loss is None else loss).detach(),
            model=self.model,
            optimizer=self.optimizer,
            batch=batch,
            stepped=moved is not False,
            recorded=recorded,
            problem_of=self._problem,
            probe_batch=self._probe_batch,
            kept=self._kept,
            note=self.note,
        )
        if self._looks and not ("seen" in recorded and recorded["seen"].activations):
            self._replay(step, recorded)
        for text in getattr(recorded.get("seen"), "unseen", ()):
            self.note("capture", text)
        wrong = misplaced(step, moved=moved, scaled=self._recorder.scaler is not None)
        if wrong:
            self.note("monitor", wrong)
        return step

    def _as_probe(self, batch: Any, *, given: bool) -> Any:
        return probe_data(batch, self.model, train=self._options["mode"] == "train", given=given)

    def _replay(self, step: Step, recorded: dict[str, Any]) -> None:
        """Where hooks saw nothing (compiled models, other entries than `forward`), run the batch once more."""
        try:
            recorded["seen"] = replay(self._problem(step.batch), self._keep)
        except CannotTell:
            pass  # what hooks saw is what there is
        except FAILURES as error:
            self.note("capture", f"the batch could not be run again: {type(error).__name__}: {_short(error)}")

    def _problem(self, batch: Any) -> Problem:
        if batch is None:
            raise CannotTell("expected a batch, got none; call monitor.step(loss, batch)")
        loss = self._loss or (F.cross_entropy if _classes(batch) else None)
        if loss is None:
            raise CannotTell("expected a loss function, got none; give Monitor(..., loss=)")
        batch = tuple(batch) if isinstance(batch, list) and is_batch(batch) else batch
        try:
            return Problem(self.model, loss, batch, **self._options)
        except (TypeError, ValueError) as error:
            raise CannotTell(f"{error}; give forward= and loss= to the monitor, or another batch to step") from error

    def _is_stale(self, slot: Slot, step: Step) -> bool:
        """Whether a dear probe that nothing must be recorded for asks to run now."""
        stale = attribute(slot.probe, "stale") if slot.dear and not slot.needs and slot.failures < 3 else None
        return stale is not None and bool(stale(step))

    def _run(self, slot: Slot, step: Step) -> dict[str, float | Tensor]:
        """The readings of a probe; what it cannot tell is a note."""
        began, refused = self.clock.time_s, False
        try:
            return numbers(slot.probe(step))
        except NotRecorded as missing:
            if missing.need in slot.needs:
                self.note(slot.name, f"{missing.need} could not be recorded")
            slot.needs.add(missing.need)
            refused = True
        except CannotTell as reason:
            self.note(slot.name, " ".join(str(reason).split()))
            refused = True
        except FAILURES as error:
            slot.failures += 1  # whatever is wrong with a probe, the training goes on
            self.note(slot.name, f"failed: {type(error).__name__}: {_short(error)}")
        finally:
            slot.ran(self.clock.time_s - began)
        if refused:
            slot.refused(self.number)
        return {}

    def _pay(self) -> None:
        """Share what is left of the budget among dear probes, and make cheap ones rarer where they alone exceed it.

        What every step costs cannot be saved by running probes rarely; dear ones get a quarter of the budget at least.
        """
        clock, budget_s = self.clock, self.budget * self.clock.step_s
        dear = [slot for slot in self.slots if slot.dear]
        rare = [slot for slot in self.slots if not (slot.dear or slot.fixed or slot.scheduled)]
        n = max((slot.n for slot in rare), default=1)
        for slot in dear:
            slot.earn(max(budget_s - clock.every_s - clock.cheap_s / n, budget_s / 4) / len(dear))
        if rare and self.number % (10 * n) == 0 and clock.seen >= SETTLED and clock.cheap_s / n > budget_s and n < 1000:
            for slot in rare:
                slot.n *= 2
            self.note("monitor", f"cheap probes took more than the budget: every {2 * n} steps from now on")

    # What came of it

    def _settle(self, step: Step, readings: dict[str, Any]) -> tuple[Alarm, ...]:
        self._pending = [(replace(s, batch=None), r) for s, r in self._pending] + [(step, readings)]
        if self.number % self._sync_every and not any(slot.dear for slot in self._due):
            return ()
        return self._flush()

    def _flush(self) -> tuple[Alarm, ...]:
        """Bring the pending numbers from the device, and tell history, rules and sinks."""
        raised: list[Alarm] = []
        for (step, _), readings in zip(self._pending, floats([r for _, r in self._pending]), strict=True):
            if self._due:
                readings["monitor/overhead"] = self.clock.overhead
            self.history.add(step.number, readings)
            self._sinks.write(step.number, self.clock.time_s, readings)
            raised += self._judge.news(self.history, step, self.note)
        self._pending = []
        self.alarms += raised
        for alarm in raised:
            self._sinks.alarm(alarm)
        return tuple(raised)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _classes(batch: Any) -> bool:
    """Whether a mapping holds class indices; labels that are real numbers belong to a loss that we do not know."""
    key = target_key(batch) if is_mapping(batch) else None
    return key is not None and isinstance(batch[key], Tensor) and not batch[key].dtype.is_floating_point
