"""The one torch `Optimizer`: it carries any rule, with PyTorch's conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from towtank.optim import options
from towtank.optim.engine import EngineName, Surround, Work, advance, compiles, surrounded
from towtank.optim.rule import Decay, Role, Rule
from towtank.optim.sharded import alike, counted_everywhere, cut_too_far, mine, shared_out, whole
from towtank.optim.transforms import compensated, rounded, stochastic

NonFinite = Literal["raise", "skip"]
Rounding = Literal["nearest", "stochastic", "compensated"]
Transform = Callable[[Rule], Rule]
OWN = (
    "variant",
    "transforms",
    "rounding",
    "clip",
    "clip_each",
    "engine",
    "nonfinite",
    "skipped",
)  # pickled with the state


class Optimizer(torch.optim.Optimizer):
    """A rule as a torch optimizer. Users call its leaves: `towtank.optim.Lion(params, lr=3e-4)`.

    A complex parameter is to a rule the real tensor of its real and imaginary parts, with one more axis of 2.

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

    rules: Mapping[str, Rule]  # by variant, "" the default
    variant = ""

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
        options.one_of("rounding", rounding, Rounding)
        options.one_of("nonfinite", nonfinite, NonFinite)
        options.one_of("engine", engine, EngineName)
        self.transforms, self.rounding = tuple(transforms), rounding
        self._wrap(rule)
        self.clip, self.clip_each = options.positive("clip", clip), options.positive("clip_each", clip_each)
        self.engine: EngineName = engine
        self.nonfinite: NonFinite = nonfinite
        self.skipped = 0
        super().__init__(params, {**numbers, "weight_decay": weight_decay, "decay": decay, "maximize": maximize})

    def _wrap(self, rule: Rule) -> None:
        for transform in self.transforms:
            rule = transform(rule)
        self.rule = rule
        low = {"nearest": rounded, "stochastic": stochastic, "compensated": compensated}
        self._low = low[self.rounding](rule)
        self._kinds: dict[Tensor, Any] = {}  # the type of each parameter's state

    def __getstate__(self) -> dict[str, Any]:
        known = {} if hasattr(type(self), "rules") else {"rules": {"": self.rule}, "transforms": ()}
        return super().__getstate__() | {n: getattr(self, n) for n in OWN} | known

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # numbers that an older version did not save
            group.update({n: x for n, x in {**self.defaults, "first_lr": group["lr"]}.items() if n not in group})
        if "rule" not in self.__dict__:
            self._wrap(self.rules[self.variant])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults where it names no numbers of its own.

        Raises:
            ValueError: for a bad number, role or kind of decay.
            TypeError: for complex-valued hyper-parameters or parameters that are no tensors.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            options.check_group(group, self.rule)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        group.setdefault("first_lr", group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"])
        if self.rule.prepare is not None:
            with torch.no_grad():
                for p in group["params"]:
                    prepared = self.rule.prepare(options.as_real(whole(p)), self.role_of(p, group))
                    options.as_real(mine(p)).copy_(mine(shared_out(prepared, p)))

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
        moved: list[Tensor] = []
        lost: list[int] = []
        for group, hyper, step, around, members in list(self._batches()):  # whoever is refused, nobody has moved
            works = [self._work(p, group) for p in members]
            torch._foreach_add_([self.state[p]["step"] for p in members], 1)  # pyright: ignore[reportPrivateImportUsage]
            lost += advance(self._rule(members[0]), works, hyper, step, around, engine=self.engine)
            for p, work in zip(members, works, strict=True):
                self._put_back(p, work)
            moved += members
        if moved and not compiles(self.engine, moved[0].device):
            lost = counted_everywhere(lost, moved, self.rule.reach)
            options.complain({self.name_of(p): n for p, n in zip(moved, lost, strict=True) if n})
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
            unknown = set(diagonals) - {self.name_of(p) for p, _ in pairs}
            if unknown:
                raise ValueError(f"no parameter is called {min(unknown)!r}; pass model.named_parameters() for names")
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
            sample = options.as_real(whole(sample))
            if not bool(torch.isfinite(sample).all()):
                raise FloatingPointError(f"{self.name_of(p)}: the curvature sample is not finite")
            self._start(p, group)
            self.state[p]["observed"] += 1
            observe, count = self._rule(p).observe, float(self.state[p]["observed"])
            assert observe is not None
            self._keep(p, observe(self._state(p, group, whole), sample, self.hyper(group), count), sample)

    @torch.no_grad()
    def statistics(self) -> dict[str, dict[str, float]]:
        """What the next step with the present gradients would do, by parameter: nothing moves.

        `update_rms` is the root mean square of the step (with decay). For tensors of two dimensions or more `effective_lr`
        is ||step without its part along the weights|| / ||weights||: how far scale-invariant weights turn, in radians (van
        Laarhoven 2017, section 3, whose lr / ||w||^2 is this for plain gradient descent). The others are the rule's.

        Raises:
            RuntimeError: if the rule needs curvature and has observed none.
        """
        told: dict[str, dict[str, float]] = {}
        for group, hyper, step, around, members in self._batches():
            for p in members:
                work = self._work(p, group, whole)
                rule = self._rule(p)
                new, _ = surrounded(rule, work.param, work.grad, work.state, hyper, step, around)
                values = options.sizes(work.param.double(), new.double() - work.param.double())
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
                    found[self.name_of(p)] = shared_out(
                        diagonal(self._state(p, group, whole), self.hyper(group), step), p
                    )
        if not found:
            raise RuntimeError("no parameter has taken a step yet; call step() first")
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their types, so that a resumed run is the uninterrupted one bit by bit.

        Raises:
            ValueError: if it is the state of other groups, of another rule, or of another way of storing.
        """
        final: list[dict[str, Any]] = []  # what hooks before the loading have made of it
        hook = self.register_load_state_dict_pre_hook(lambda _, state: final.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = [i for g in final[0]["param_groups"] for i in g["params"]]
        self._kinds.clear()
        for i, (p, group) in zip(saved, [(p, g) for g in self.param_groups for p in g["params"]], strict=True):
            if i in final[0]["state"]:
                stored = final[0]["state"][i]
                expected = {"step", *self._kind(p, group)._fields} | ({"observed"} if self.rule.observe else set())
                if set(stored) != expected:
                    raise ValueError(
                        f"{self.name_of(p)}: expected a state of {', '.join(sorted(expected))}, got "
                        f"{', '.join(sorted(stored))}; load it into the optimizer, with the options, that saved it"
                    )
                self.state[p] = {
                    k: v.to("cpu" if k in ("step", "observed") else p.device, copy=True) for k, v in stored.items()
                }

    def _batches(self):  # noqa: ANN202
        """(group, hyper, step, surround, parameters): parameters that share a rule and all numbers of a step."""
        grads = [p.grad for p in self._refuse_sparse() if p.grad is not None]
        scale = options.global_scale(grads, self.clip) if self.clip else 1.0
        for group in self.param_groups:
            alike: dict[tuple[float, bool, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._ready(p, group)
                    key = (float(self.state[p]["step"]) + 1, p.dtype in options.LOW, p.device)
                    alike.setdefault(key, []).append(p)
            decay = 0.0 if self.rule.decays else group["weight_decay"]
            share = options.share_of_peak(group) if group["decay"] == "independent" else 1.0
            around = Surround.of(group["decay"], decay, group["lr"], share, scale)
            for (step, *_), members in alike.items():
                yield group, self.hyper(group), step, around, members

    def _rule(self, param: Tensor) -> Rule:
        return self._low if param.dtype in options.LOW else self.rule

    def hyper(self, group: Mapping[str, Any]) -> Any:
        """The rule's numbers of a group."""
        known = dict(group)
        if "betas" in group:
            known |= {f"beta{i}": b for i, b in enumerate(group["betas"], start=1)}
        return self.rule.hyper(**{n: known[n] for n in self.rule.hyper._fields if n in known})  # pyright: ignore[reportAttributeAccessIssue]

    def role_of(self, param: Tensor, group: Mapping[str, Any]) -> Role:
        """What a parameter is for: its group's role, or `vector` up to one dimension and `matrix` above."""
        return group.get("role") or ("vector" if param.ndim + param.is_complex() <= 1 else "matrix")

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
            RuntimeError: if the rule needs curvature and has observed none.
            FloatingPointError: if a rule begins with a gradient that is not finite.
        """
        assert param.grad is not None
        self._start(param, group)
        stored = self.state[param]
        if self.rule.observe is not None and not float(stored["observed"]):
            raise RuntimeError(
                f"{self.rule.name} needs curvature and has observed none for {self.name_of(param)}; call "
                "optimizer.observe_curvature(diagonals) before step()"
            )
        every = float(group[self.rule.again]) if self.rule.again else math.inf
        if self.rule.begin is not None and not float(stored["step"]) % every:
            work = self._work(param, group, whole)
            if not bool(torch.isfinite(work.grad).all()):
                raise FloatingPointError(f"{self.name_of(param)}: the gradient that the rule begins with is not finite")
            rule = self._rule(param)
            assert rule.begin is not None
            grad = work.grad if rule.begins_with is None else rule.begins_with(work.param, work.grad)
            self._keep(param, rule.begin(work.state, grad, self.hyper(group)), grad)

    def _start(self, param: Tensor, group: Mapping[str, Any]) -> None:
        if self.state[param]:
            return
        fresh = self._rule(param).init(
            options.as_real(whole(param.detach())), self.role_of(param, group), self.hyper(group)
        )
        observed = {"observed": torch.tensor(0.0)} if self.rule.observe is not None else {}
        self.state[param] = {"step": torch.tensor(0.0), **observed}
        self._kinds[param] = type(fresh)
        self._keep(param, fresh)

    def _keep(self, param: Tensor, state: Any, given: Tensor | None = None) -> None:
        """Store a state that was computed on whole tensors; a tensor that was given stays its owner's."""
        fresh = {f: s.clone() if s is given else s for f, s in state._asdict().items()}
        self.state[param].update({f: shared_out(s, param) for f, s in fresh.items()})

    def _kind(self, param: Tensor, group: Mapping[str, Any]) -> Any:
        if param not in self._kinds:  # after loading: the type may depend on the shape
            like = options.as_real(torch.zeros(param.shape, dtype=param.dtype, device=param.device))
            fresh = self._rule(param).init(like, self.role_of(param, group), self.hyper(group))
            self._kinds[param] = type(fresh)
        return self._kinds[param]

    def _state(self, param: Tensor, group: Mapping[str, Any], seen: Callable[[Tensor], Tensor]) -> Any:
        kind, stored = self._kind(param, group), self.state[param]
        return kind(*(seen(stored[f]) for f in kind._fields))

    def _work(self, param: Tensor, group: Mapping[str, Any], seen: Callable[[Tensor], Tensor] | None = None) -> Work:
        """What a rule is shown: this process's part of a parameter where that is enough, else all of it."""
        seen = seen or (whole if cut_too_far(self.rule.reach, param) else mine)
        assert param.grad is not None
        grad = options.as_real(seen(alike(param.grad, param)))
        if group["maximize"]:
            grad = -grad
        if self.clip_each:
            grad = options.global_scale([param.grad], self.clip_each) * options.at_least_single(grad)
        return Work(options.as_real(seen(param.detach())), grad, self._state(param, group, seen))

    def _put_back(self, param: Tensor, work: Work) -> None:
        """After a step on all of a parameter that processes share, each keeps its part."""
        if cut_too_far(self.rule.reach, param):
            options.as_real(mine(param)).copy_(mine(shared_out(work.param, param)))
            self._keep(param, work.state)

    def _all_finite(self) -> bool:
        params = self._refuse_sparse()
        grads = [mine(alike(p.grad, p)) for p in params if p.grad is not None]
        lost = [int(not bool(torch.isfinite(g).all())) for g in grads]
        return not any(counted_everywhere(lost, params, "element"))

    def _refuse_sparse(self) -> list[Tensor]:
        """The parameters that have gradients, all dense.

        Raises:
            TypeError: if one is not.
        """
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p in params:
            options.refuse_sparse(p, self.name_of)
        return params
