"""The one torch `Optimizer`: it carries any rule, with PyTorch's conventions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from towtank.optim.engine import EngineName, Surround, Work, advance, surrounded
from towtank.optim.rule import ROLES, Decay, Role, Rule
from towtank.optim.transforms import compensated, rounded, stochastic

NonFinite = Literal["raise", "skip"]
Rounding = Literal["nearest", "stochastic", "compensated"]
Transform = Callable[[Rule], Rule]
LOW = (torch.bfloat16, torch.float16)


class Optimizer(torch.optim.Optimizer):
    """A rule as a torch optimizer. Users call its leaves: `towtank.optim.Lion(params, lr=3e-4)`.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either; a group may have its own numbers and a `role`.
        rule: the update rule.
        numbers: hyper-parameters by the names of the official implementation; `betas` stands for beta1 and beta2.
        weight_decay: lambda.
        decay: how it acts, see `Surround.of`.
        maximize: ascend instead of descend.
        clip: largest global norm of the gradients, or None.
        clip_each: largest norm of each parameter's gradient, or None.
        transforms: functions from rule to rule (`towtank.optim.transforms`), the first innermost.
        rounding: how bfloat16 and float16 parameters are stored after a step, which is computed in float32.
        engine: how the rule is carried out, see `advance`.
        nonfinite: a gradient that is not finite: `raise` names the parameter (its bad elements have not moved and its
            state is clean), `skip` leaves the whole step out and counts it in `skipped`.

    Raises:
        ValueError: for numbers that are negative, NaN or out of range, or unknown options.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        numbers: Mapping[str, Any],
        *,
        weight_decay: float = 0.0,
        decay: Decay = "decoupled",
        maximize: bool = False,
        clip: float | None = None,
        clip_each: float | None = None,
        transforms: Sequence[Transform] = (),
        rounding: Rounding = "nearest",
        engine: EngineName = "auto",
        nonfinite: NonFinite = "raise",
    ) -> None:
        for transform in transforms:
            rule = transform(rule)
        if rounding not in get_args(Rounding):
            raise ValueError(f"rounding = {rounding!r}: expected one of {', '.join(get_args(Rounding))}")
        self.rule = rule
        self._low = {"nearest": rounded, "stochastic": stochastic, "compensated": compensated}[rounding](rule)
        self.clip, self.clip_each = _positive("clip", clip), _positive("clip_each", clip_each)
        self.engine: EngineName = engine
        self.nonfinite: NonFinite = nonfinite
        self.skipped = 0
        self._kinds: dict[Tensor, Any] = {}  # the type of each parameter's state
        if nonfinite not in get_args(NonFinite) or engine not in get_args(EngineName):
            raise ValueError(f"expected nonfinite raise | skip and a known engine, got {nonfinite!r} and {engine!r}")
        super().__init__(params, {**numbers, "weight_decay": weight_decay, "decay": decay, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults where it names no numbers of its own.

        Raises:
            ValueError: for a bad number, role or kind of decay.
            TypeError: for complex-valued hyper-parameters or parameters that are no tensors.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        if self.rule.prepare is not None:
            with torch.no_grad():
                for p in group["params"]:
                    p.copy_(self.rule.prepare(p, self.role_of(p, group)))

    def _check(self, group: Mapping[str, Any]) -> None:
        for name, value in group.items():
            if name not in ("lr", "weight_decay", "eps", "betas", "momentum", "rho") or value is None:
                continue
            for x in value if isinstance(value, tuple | list) else (value,):
                x = float(x)
                if not (math.isfinite(x) and x >= 0):
                    raise ValueError(f"{name} = {value}: expected a finite number >= 0")
                if name == "betas" and x >= 1:
                    raise ValueError(f"betas = {value}: expected numbers in [0, 1)")
        if group.get("role") not in (None, *ROLES):
            raise ValueError(f"role = {group['role']!r}: expected one of {', '.join(ROLES)}")
        Surround.of(group["decay"], 0.0, 0.0, 0.0, 1.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the loss; called once, with gradients enabled.

        Raises:
            FloatingPointError: if a gradient is not finite and `nonfinite` is `raise`.
            TypeError: for sparse gradients.
            RuntimeError: if the rule needs curvature and has observed none.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.nonfinite == "skip" and not self._all_finite():
            self.skipped += 1
            return loss
        bad = []
        for group, hyper, step, around, members in self._batches():
            works = [self._work(p, group) for p in members]
            for p in members:
                self.state[p]["step"] += 1
            lost = advance(self._rule(members[0]), works, hyper, step, around, engine=self.engine)
            bad += [(self.name_of(p), n) for p, n in zip(members, lost, strict=True) if n]
        if bad:
            raise FloatingPointError(
                "the gradient is not finite in "
                + ", ".join(f"{name} ({n} numbers)" for name, n in bad)
                + "; those elements have not moved. Lower the learning rate, or pass nonfinite='skip' to leave such steps out"
            )
        return loss

    @torch.no_grad()
    def observe_curvature(self, diagonals: Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Hand a sample of the curvature's diagonal to the rule, before `step()`.

        Args:
            diagonals: one tensor per parameter, in the order of the groups or by name: the raw sample, z * (H z) for rules
                with `signed` curvature, the squared sampled-label gradient for `squared`. None leaves a parameter out.

        Raises:
            ValueError: if the rule uses no curvature, or shapes do not fit.
            FloatingPointError: if a sample is not finite.
        """
        if self.rule.observe is None:
            raise ValueError(f"{self.rule.name} uses no curvature; leave observe_curvature out")
        pairs = [(p, g) for g in self.param_groups for p in g["params"]]
        if isinstance(diagonals, Mapping):
            samples = [diagonals.get(self.name_of(p)) for p, _ in pairs]
        else:
            samples = list(diagonals)
        if len(samples) != len(pairs):
            raise ValueError(f"expected one diagonal per parameter, {len(pairs)} of them, got {len(samples)}")
        for (p, group), sample in zip(pairs, samples, strict=True):
            if sample is None:
                continue
            if sample.shape != p.shape:
                raise ValueError(
                    f"{self.name_of(p)}: expected a diagonal of shape {tuple(p.shape)}, got {tuple(sample.shape)}"
                )
            if not bool(torch.isfinite(sample).all()):
                raise FloatingPointError(f"{self.name_of(p)}: the curvature sample is not finite")
            self._start(p, group)
            stored = self.state[p]
            stored["observed"] += 1
            observe, count = self._rule(p).observe, float(stored["observed"])
            assert observe is not None
            seen = observe(self._state(p, group), _real(sample), self.hyper(group), count)
            stored.update({f: new.clone() if new is sample else new for f, new in seen._asdict().items()})

    @torch.no_grad()
    def statistics(self) -> dict[str, dict[str, float]]:
        """What the next step with the present gradients would do, by parameter: nothing moves.

        `update_rms` is the root mean square of the step (with decay); the others are the statistics of the rule.

        Raises:
            RuntimeError: if the rule needs curvature and has observed none.
        """
        told: dict[str, dict[str, float]] = {}
        for group, hyper, step, around, members in self._batches():
            for p in members:
                work = self._work(p, group)
                rule = self._rule(p)
                new, _ = surrounded(rule, work.param, work.grad, work.state, hyper, step, around)
                values = {"update_rms": (new - work.param).float().square().mean().sqrt()}
                if rule.statistics is not None:
                    values |= rule.statistics(work.param, work.grad, work.state, hyper, step)
                told[self.name_of(p)] = {k: float(v) for k, v in values.items()}
        return told

    @torch.no_grad()
    def preconditioner(self) -> dict[str, Tensor]:
        """The diagonal D of the step lr m / D by parameter, for `towtank.Preconditioned`.

        Raises:
            RuntimeError: if no step was taken, or the rule has no diagonal preconditioner.
        """
        if self.rule.preconditioner is None:
            raise RuntimeError(f"{self.rule.name} has no diagonal preconditioner")
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state and "step" in self.state[p]:
                    step = float(self.state[p]["step"])
                    diagonal = self._rule(p).preconditioner
                    assert diagonal is not None
                    found[self.name_of(p)] = diagonal(self._state(p, group), self.hyper(group), step)
        if not found:
            raise RuntimeError("no parameter has taken a step yet; call step() first")
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their types, so that a resumed run is the uninterrupted one bit by bit."""
        super().load_state_dict(state_dict)
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        self._kinds.clear()
        for i, p in zip(saved, params, strict=True):
            if i in state_dict["state"]:
                self.state[p] = {
                    k: v.to("cpu" if k in ("step", "observed") else p.device, copy=True)
                    for k, v in state_dict["state"][i].items()
                }

    def _batches(self):  # noqa: ANN202
        """(group, hyper, step, surround, parameters): parameters that share a rule and all numbers of a step."""
        scale = self._global_scale()
        for group in self.param_groups:
            alike: dict[tuple[float, bool, float], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._ready(p, group)
                    own = _clip_scale(p.grad, self.clip_each) if self.clip_each else 1.0
                    alike.setdefault((float(self.state[p]["step"]) + 1, p.dtype in LOW, own), []).append(p)
            lr = group["lr"]
            peak = float(group.get("initial_lr", self.defaults["lr"]))
            share = float(lr) / peak if peak else 0.0
            decay = 0.0 if self.rule.decays else group["weight_decay"]
            for (step, _, own), members in alike.items():
                yield (
                    group,
                    self.hyper(group),
                    step,
                    Surround.of(group["decay"], decay, lr, share, scale * own),
                    members,
                )

    def _global_scale(self) -> float:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not self.clip or not grads:
            return 1.0
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
        return float((self.clip / (norm + 1e-6)).clamp(max=1.0)) if bool(torch.isfinite(norm)) else 1.0

    def _rule(self, param: Tensor) -> Rule:
        return self._low if param.dtype in LOW else self.rule

    def hyper(self, group: Mapping[str, Any]) -> Any:
        """The rule's numbers of a group."""
        known = dict(group)
        if "betas" in group:
            known |= {f"beta{i}": b for i, b in enumerate(group["betas"], start=1)}
        return self.rule.hyper(**{n: known[n] for n in self.rule.hyper._fields if n in known})  # pyright: ignore[reportAttributeAccessIssue]

    def role_of(self, param: Tensor, group: Mapping[str, Any]) -> Role:
        """What a parameter is for: its group's role, or `vector` up to one dimension and `matrix` above."""
        return group.get("role") or ("vector" if param.ndim <= 1 else "matrix")

    def name_of(self, param: Tensor) -> str:
        """The name of a parameter, if names were given, else its place and shape."""
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is param:
                    names = group.get("param_names")
                    return names[j] if names else f"group {i}, parameter {j} of shape {tuple(p.shape)}"
        return "an unknown parameter"

    def _ready(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """State for a parameter that has a gradient.

        Raises:
            TypeError: for a sparse gradient.
            RuntimeError: if the rule needs curvature and has observed none.
            FloatingPointError: if a rule begins with a gradient that is not finite.
        """
        assert param.grad is not None
        if param.grad.is_sparse:
            raise TypeError(
                f"{self.name_of(param)}: expected a dense gradient, got a sparse one; use Embedding(sparse=False)"
            )
        self._start(param, group)
        stored = self.state[param]
        if self.rule.observe is not None and not float(stored["observed"]):
            raise RuntimeError(
                f"{self.rule.name} needs curvature and has observed none for {self.name_of(param)}; call "
                "optimizer.observe_curvature(diagonals) before step()"
            )
        every = float(group[self.rule.again]) if self.rule.again else math.inf
        if self.rule.begin is not None and not float(stored["step"]) % every:
            if not bool(torch.isfinite(param.grad).all()):
                raise FloatingPointError(f"{self.name_of(param)}: the gradient that the rule begins with is not finite")
            begin = self._rule(param).begin
            assert begin is not None
            begun = begin(self._state(param, group), _real(param.grad), self.hyper(group))
            stored.update(begun._asdict())

    def _start(self, param: Tensor, group: Mapping[str, Any]) -> None:
        if self.state[param]:
            return
        fresh = self._rule(param).init(_real(param.detach()), self.role_of(param, group), self.hyper(group))
        observed = {"observed": torch.tensor(0.0)} if self.rule.observe is not None else {}
        self.state[param] = {"step": torch.tensor(0.0), **observed, **fresh._asdict()}
        self._kinds[param] = type(fresh)

    def _state(self, param: Tensor, group: Mapping[str, Any]) -> Any:
        kind = self._kinds.get(param)
        if kind is None:
            like = torch.zeros_like(_real(param.detach()))  # the type may depend on the shape
            kind = self._kinds[param] = type(
                self._rule(param).init(like, self.role_of(param, group), self.hyper(group))
            )
        stored = self.state[param]
        return kind(*(stored[f] for f in kind._fields))

    def _work(self, param: Tensor, group: Mapping[str, Any]) -> Work:
        assert param.grad is not None
        grad = -param.grad if group["maximize"] else param.grad
        return Work(_real(param.detach()), _real(grad), self._state(param, group))

    def _all_finite(self) -> bool:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        return all(bool(torch.isfinite(g).all()) for g in grads)


def _positive(name: str, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value}: expected a positive number, or None")
    return value


def _clip_scale(grad: Tensor, largest: float) -> float:
    norm = float(torch.linalg.vector_norm(grad.float()))
    return min(1.0, largest / (norm + 1e-6)) if math.isfinite(norm) else 1.0


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def optimizer_class(name: str, rule: Rule) -> type[Optimizer]:
    """A torch optimizer class of a rule: `name(params, lr=..., betas=..., ..., weight_decay=..., variant=...)`.

    Its keywords are the fields of the rule's `hyper`, with beta1, beta2, ... gathered into `betas`, then those of `Optimizer`.
    """
    numbers = _numbers(rule)

    def __init__(self, params: ParamsT, *args: Any, variant: str = "", **options: Any) -> None:  # noqa: ANN001, N807
        chosen = _variant(name, rule, variant)
        given = dict(zip(numbers, args, strict=False)) | {k: options.pop(k) for k in numbers if k in options}
        if len(args) > len(numbers):
            raise TypeError(f"{name}: expected at most {len(numbers)} numbers ({', '.join(numbers)}), got {len(args)}")
        options = {"weight_decay": chosen.weight_decay, "decay": chosen.decay} | options
        Optimizer.__init__(self, params, chosen, _numbers(chosen) | given, **options)

    signature = inspect.signature(Optimizer.__init__)
    own = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=v) for n, v in numbers.items()]
    common = [p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    extra = inspect.Parameter("variant", inspect.Parameter.KEYWORD_ONLY, default="")
    first = [signature.parameters["self"], signature.parameters["params"]]
    __init__.__signature__ = signature.replace(parameters=[*first, *own, *common, extra])  # pyright: ignore[reportFunctionMemberAccess]
    members = {"__init__": __init__, "__module__": "towtank.optim", "__qualname__": name, "__doc__": _document(rule)}
    return type(name, (Optimizer,), members)


def _numbers(rule: Rule) -> dict[str, Any]:
    defaults: dict[str, Any] = rule.hyper()._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    betas = tuple(v for k, v in defaults.items() if k[:4] == "beta" and k[4:].isdigit())
    numbers: dict[str, Any] = {}
    for k, v in defaults.items():
        if k[:4] == "beta" and k[4:].isdigit():
            numbers["betas"] = betas
        elif k != "weight_decay":
            numbers[k] = v
    return numbers


def _variant(name: str, rule: Rule, variant: str) -> Rule:
    if not variant or variant == "paper" and not rule.variants:
        return rule
    if variant not in rule.variants:
        raise ValueError(f"{name}: variant = {variant!r}: expected one of {', '.join(rule.variants) or 'paper'}")
    return rule.variants[variant]


def _document(rule: Rule) -> str:
    lines = [f"{rule.summary[:1].upper()}{rule.summary[1:]}.", "", f"Source: {rule.source}."]
    return "\n".join([*lines, *(["", "Deviations:"] if rule.deviations else []), *(f"- {d}" for d in rule.deviations)])
