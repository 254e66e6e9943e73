"""A rule on many members at once: tensors stacked along a member axis, each member with its own numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from towtank.optim.engine import PIECE, Surround, Work, advance, has_kernel, surrounded
from towtank.optim.rule import Role, Rule


class Members:
    """State and update of E members of one structure.

    Args:
        rule: the rule of all members.
        params: by name, of shape (E, ...); advanced in place.
        roles: by name.
        hyper: the rule's numbers, each of shape (E,), float64.

    Example:
        >>> from towtank.optim.rules import lion
        >>> params = {"w": torch.ones(2, 3)}
        >>> rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
        >>> members = Members(lion.RULE, params, {"w": "vector"}, lion.Hyper(rates, *torch.full((2, 2), 0.9).double()))
        >>> everyone = torch.ones(2, dtype=torch.bool)
        >>> members.advance({"w": torch.ones(2, 3)}, lambda name, hyper: (hyper, Surround()), everyone)
        >>> params["w"][:, 0]
        tensor([0.9000, 0.8000])
    """

    def __init__(self, rule: Rule, params: Mapping[str, Tensor], roles: Mapping[str, Role], hyper: Any) -> None:
        self.rule, self.params, self.roles, self.hyper = rule, params, roles, hyper
        self.updates, self.observed = 0, 0
        if rule.prepare is not None:
            for name, p in params.items():
                p.copy_(torch.stack([rule.prepare(one, roles[name]) for one in p]))
        self.state = {name: self._init(p, roles[name]) for name, p in params.items()}
        first = next(iter(params.values()))
        self._native = first.device.type == "cpu" and has_kernel(rule, first.dtype)
        self._views = {n: self._unbind(n) for n in params} if self._native else {}

    def _init(self, param: Tensor, role: Role) -> Any:
        each = [self.rule.init(p, role, type(self.hyper)(*(h[e] for h in self.hyper))) for e, p in enumerate(param)]
        return type(each[0])(*(torch.stack(columns) for columns in zip(*each, strict=True)))

    def _unbind(self, name: str) -> list[tuple[Tensor, Any]]:
        state = self.state[name]
        rows = zip(*(s.unbind() for s in state), strict=True) if len(state) else ((),) * len(self.params[name])
        return [(p, type(state)(*s)) for p, s in zip(self.params[name].unbind(), rows, strict=True)]

    @torch.no_grad()
    def advance(
        self, grads: Mapping[str, Tensor], numbers: Callable[[str, Any], tuple[Any, Surround]], moved: Tensor
    ) -> None:
        """One update of the members that move; the others keep parameters and state.

        Args:
            grads: by name, of the shape of the parameters.
            numbers: `(name, hyper) -> (hyper, surround)`, columns of shape (E,): what this tensor's learning rate, decay
                and clipping are now.
            moved: which members move, (E,).
        """
        if self.rule.begin is not None:
            self._begin(grads, self.rule.begin, moved)
        self.updates += 1
        told = {name: numbers(name, self.hyper) for name in grads}
        (self._one_by_one if self._native else self._together)(grads, told, moved)

    @torch.no_grad()
    def observe(self, samples: Mapping[str, Tensor], moved: Tensor) -> None:
        """Fold a sample of the curvature's diagonal into the state of the members that move.

        Args:
            samples: by name, of the shape of the parameters; a member's sample that is not finite is left out.
            moved: which members move, (E,).
        """
        assert self.rule.observe is not None
        self.observed += 1
        count, observe = self.observed, self.rule.observe
        sound = torch.stack([s.flatten(1).isfinite().all(1) for s in samples.values()]).all(0) & moved
        for name, sample in samples.items():
            fresh = torch.vmap(lambda s, x, h: observe(s, x, h, count))(
                self.state[name], sample, _cast(self.hyper, sample)
            )
            for old, new in zip(self.state[name], fresh, strict=True):
                old.copy_(torch.where(sound.view(-1, *(1,) * (old.ndim - 1)), new, old))

    def directions(self, grads: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """The step each member would take at learning rate 1 with its gradients times `scale` (E,), before decay."""
        ones = self.hyper._replace(lr=torch.ones_like(self.hyper.lr))
        if self.rule.decays:
            ones = ones._replace(weight_decay=torch.zeros_like(ones.weight_decay))

        def one(param: Tensor, grad: Tensor, state: Any, hyper: Any, scale: Tensor) -> Tensor:
            return param - self.rule.update(param, scale * grad, state, hyper, self.updates + 1)[0]

        batched = torch.vmap(one)
        return {
            n: batched(self.params[n], g, self.state[n], _cast(ones, g), scale.to(g.dtype)) for n, g in grads.items()
        }

    def _begin(self, grads: Mapping[str, Tensor], begin: Callable[..., Any], moved: Tensor) -> None:
        """With the first gradients, and again for the members that move when their number of steps has passed."""
        if self.updates and not self.rule.again:
            return
        due = moved & (self.updates % getattr(self.hyper, self.rule.again) == 0) if self.updates else moved | True
        if not bool(due.any()):
            return
        for name, grad in grads.items():
            sound = grad.nan_to_num(0.0, 0.0, 0.0)  # a lost member's gradient must not stop the others
            fresh = torch.vmap(begin)(self.state[name], sound, _cast(self.hyper, grad))
            for old, new in zip(self.state[name], fresh, strict=True):
                old.copy_(torch.where(due.view(-1, *(1,) * (old.ndim - 1)), new, old))

    def _one_by_one(self, grads: Mapping[str, Tensor], told: dict[str, tuple[Any, Surround]], moved: Tensor) -> None:
        lists = {name: [_list(x) for x in (*h, s.shrink, s.l2, s.scale)] for name, (h, s) in told.items()}
        rows = {name: g.contiguous().unbind() for name, g in grads.items()}
        for e, moves in enumerate(moved.tolist()):
            if not moves:
                continue
            kinds: dict[tuple[float, ...], list[str]] = {}
            for name, columns in lists.items():
                kinds.setdefault(tuple(c[e % len(c)] for c in columns), []).append(name)
            for values, names in kinds.items():
                works = [Work(self._views[n][e][0], rows[n][e], self._views[n][e][1]) for n in names]
                *hyper, shrink, l2, scale = values
                advance(self.rule, works, type(self.hyper)(*hyper), self.updates, Surround(shrink, l2, scale))

    def _together(self, grads: Mapping[str, Tensor], told: dict[str, tuple[Any, Surround]], moved: Tensor) -> None:
        for name, grad in grads.items():
            told_hyper, told_around = told[name]
            hyper = _cast(told_hyper, grad)
            around = tuple(_column(x, moved, grad) for x in (told_around.shrink, told_around.l2, told_around.scale))
            for p, g, *s in self._pieces(self.params[name], grad, self.state[name]):
                self._vmapped(p, g, type(self.state[name])(*s), hyper, around, moved)

    def _vmapped(self, param: Tensor, grad: Tensor, state: Any, hyper: Any, around: Any, moved: Tensor) -> None:
        def one(param: Tensor, grad: Tensor, state: Any, hyper: Any, around: Any, moves: Tensor) -> tuple[Tensor, Any]:
            new, fresh = surrounded(self.rule, param, grad, state, hyper, self.updates, Surround(*around))
            kept = (torch.where(moves, n, o) for n, o in zip(fresh, state, strict=True))
            return torch.where(moves, new, param), type(state)(*kept)

        new, fresh = torch.vmap(one)(param, grad, state, hyper, around, moved)
        param.copy_(new)
        for old, s in zip(state, fresh, strict=True):
            old.copy_(s)

    def _pieces(self, param: Tensor, grad: Tensor, state: Any):  # noqa: ANN202
        members = param.shape[0]
        alike = all(s.shape == param.shape for s in state)  # a number per tensor cannot be cut
        if param.device.type != "cpu" or self.rule.reach != "element" or not alike:
            return [(param, grad, *state)]
        flat = (t.reshape(members, -1) if t is grad else t.view(members, -1) for t in (param, grad, *state))
        return list(zip(*(t.split(max(1, PIECE // members), dim=1) for t in flat), strict=True))


def _list(x: float | Tensor) -> list[float]:
    return x.tolist() if isinstance(x, Tensor) else [x]


def _cast(hyper: Any, like: Tensor) -> Any:
    return type(hyper)(*(h.to(like.device, like.dtype) for h in hyper))


def _column(x: float | Tensor, moved: Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(x, device=like.device, dtype=like.dtype).expand(moved.shape)
