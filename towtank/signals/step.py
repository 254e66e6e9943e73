"""One training step as probes see it, and what a probe is.

A probe is a function of a `Step` to named numbers. What it reads from the step is computed once and shared with every other
probe of that step; what had to be recorded *while* the step happened (`seen`, `updates`, `micro`, `raw_norms`) is recorded only
on steps where some probe is due that needs it. A probe says so in an attribute `needs`, or is understood when it first reads
something that was not recorded: `NotRecorded` tells the monitor, which records it the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from towtank.curvature import Hessian
    from towtank.problem import Problem
    from towtank.signals.capture import Seen
    from towtank.signals.per_example import ExampleGradients

Need = Literal["seen", "updates", "micro", "raw_norms"]
Readings = Mapping[str, float | Tensor]  # by key, such as "grad/norm"; a tensor has one element
Probe = Callable[["Step"], Readings]
T = TypeVar("T")
EXAMPLE_BYTES = (
    6e6  # gradients of single examples held at once: with what surrounds them less than a training step holds
)
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)  # that end no training


class NotRecorded(LookupError):
    """Something that had to be recorded while the step happened, and was not; `need` says what."""

    def __init__(self, need: Need) -> None:
        self.need: Need = need
        super().__init__(
            f"expected a step whose {need} were recorded, got one without; give the probe needs = {{{need!r}}}"
        )


class CannotTell(ValueError):
    """A probe's answer that there is no number here, and why: it is recorded, it is no error."""


@dataclass(frozen=True)
class MicroGradients:
    """Squared gradient norms of the parts of a step: one backward pass of one process each.

    Args:
        squares: of each part, {parameter: squared norm ()}, in the unit in which the parts were summed.
        sizes: number of examples of each part; None where they are not known, then they are taken as equal.
        total: {parameter: squared norm of the sum over the parts}, before clipping, as autograd left it.
    """

    squares: tuple[Mapping[str, Tensor], ...]
    sizes: tuple[int, ...] | None
    total: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One training step, just after the optimizer's update and before the gradients are cleared.

    Args:
        number: optimizer steps so far, this one included: the first is 1.
        loss: of this step, detached ().
        model: the network, without compiled and data-parallel wrappers.
        optimizer: the optimizer, or None.
        batch: this step's batch as the loop gave it, or None.
        stepped: whether the optimizer moved (a gradient scaler skips steps that overflow).
        recorded: what was recorded while the step happened.
        problem_of: makes the `Problem` of a batch; raises `CannotTell` where there is no loss function.
        probe_batch: the fixed batch on which curvature is measured.
        memo: what probes share; a dictionary the monitor keeps for the step.
        kept: {key: anything} that survives from step to step, for probes that warm-start; owned by the monitor.
        note: takes the name of a probe and a sentence for the run's notes; the same one counts once.
    """

    number: int
    loss: Tensor
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    batch: Any = None
    stepped: bool = True
    recorded: Mapping[str, Any] = field(default_factory=dict)
    problem_of: Callable[[Any], Problem] | None = None
    probe_batch: Any = None
    memo: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    note: Callable[[str, str], None] = lambda probe, text: None

    def shared(self, key: str, make: Callable[[], T]) -> T:
        """What `make` returns, computed once a step for all probes that name the same key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    # What is there at every step

    @property
    def parameters(self) -> dict[str, Tensor]:
        """{name: parameter after the update}, detached, those that require a gradient."""
        return self.shared(
            "parameters", lambda: {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        )

    @property
    def gradients(self) -> dict[str, Tensor]:
        """{name: gradient as the optimizer used it}, after clipping and unscaling; parameters without one are left out."""
        if "gradients" in self.recorded:
            return self.recorded["gradients"]
        found = ((n, p.grad) for n, p in self.model.named_parameters() if p.requires_grad)
        return self.shared("gradients", lambda: {n: g.detach() for n, g in found if g is not None})

    @property
    def lr(self) -> float:
        """The largest learning rate among the optimizer's groups; NaN without an optimizer."""
        groups = self.optimizer.param_groups if self.optimizer else []
        return max((float(g["lr"]) for g in groups if "lr" in g), default=float("nan"))

    # What is recorded while the step happens

    @property
    def seen(self) -> Seen:
        """Activations, attention and outputs of the forward passes of this step."""
        return self._recorded("seen")

    @property
    def updates(self) -> dict[str, Tensor]:
        """{name: parameter after minus before the optimizer's step}."""
        return self._recorded("updates")

    @property
    def micro(self) -> MicroGradients:
        """Gradient norms of the parts of the step: micro-batches, and the processes of data-parallel training."""
        return self._recorded("micro")

    @property
    def raw_norms(self) -> dict[str, Tensor]:
        """{name: norm of the gradient before clipping}."""
        return self._recorded("raw_norms")

    def _recorded(self, need: Need) -> Any:
        if need not in self.recorded:
            raise NotRecorded(need)
        return self.recorded[need]

    # What is computed when a probe asks

    @property
    def problem(self) -> Problem:
        """The curvature problem on the fixed probe batch."""
        return self.shared("problem", lambda: self._problem(self.probe_batch))

    @property
    def hessian(self) -> Hessian:
        """The Hessian on the probe batch, shared by all probes of the step; its graphs are built anew for every product."""
        from towtank.curvature import Hessian
        from towtank.problem.state import batch_coupled

        def make() -> Hessian:
            problem = self.problem
            coupled = problem.mode == "train" and bool(batch_coupled(problem.network))
            # the self-check costs as much as two products; differences of a coupled batch are rough at kinks
            check = "hessian" not in self.kept and not coupled
            made = Hessian(problem, retain=False, check=check)  # kept graphs would double the memory of training
            self.kept["hessian"] = True
            return made

        return self.shared("hessian", make)

    @property
    def examples(self) -> ExampleGradients:
        """Gradients of the single examples of this step's batch, at the parameters after the update.

        Where normalization couples the examples of a batch, it uses its running statistics (mode "eval").
        """
        from towtank.problem.state import batch_coupled
        from towtank.signals.per_example import ExampleGradients

        def make() -> ExampleGradients:
            problem = self._problem(self.batch)
            coupled = problem.mode == "train" and batch_coupled(problem.network)
            chunk = max(1, int(EXAMPLE_BYTES // (problem.size * problem.dtype.itemsize)))
            return ExampleGradients(problem.replace(mode="eval") if coupled else problem, chunk)

        return self.shared("examples", make)

    def _problem(self, batch: Any) -> Problem:
        if batch is None:
            raise CannotTell("expected a batch, got none; call monitor.step(loss, batch)")
        if self.problem_of is None:
            raise CannotTell("expected a loss function, got none; give Monitor(..., loss=)")
        return self.problem_of(batch)
