"""What an update rule is: two pure functions of one tensor, and what a reader should know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Role = Literal["embedding", "matrix", "head", "vector"]
Reach = Literal["element", "row", "tensor"]
Decay = Literal["decoupled", "independent", "coupled"]
Curvature = Literal["", "signed", "squared"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """An update rule: `init(param, role, hyper) -> state` and `update(param, grad, state, hyper, step) -> (param, state)`.

    Both are pure: they write to nothing, read no `.grad`, call no `.item()` and take no Python branch on a value (a branch
    on the type of the state or on its absence is fine). `hyper` and `state` are NamedTuples; the fields of `hyper` are
    numbers, 0-d tensors or, inside an ensemble, tensors batched by `vmap`; the fields of `state` are tensors. `step` is
    counted from 1. Weight decay and clipping surround a rule (see `towtank.optim.engine`) unless it `decays`.

    Args:
        name: how users call it.
        hyper: NamedTuple class of the hyper-parameters, `lr` first, with the official defaults.
        init: state of a new parameter.
        update: one step.
        prepare: `(param, role) -> param`, once, when the optimizer is made: what the rule demands of weights.
        begin: `(state, grad, hyper) -> state`, with the first gradient of the parameter, outside the pure update.
        begins_with: `(param, grad) -> grad`: what `begin` is given, where a transform changes the gradient.
        within: `(run, param, grad, state) -> (param, state)`: where a transform carries a step out in another precision. It
            calls `run(rule, param, grad, state)` there, so that decay and clipping have that precision too.
        again: the number of `hyper` that says after how many steps `begin` is repeated; empty: it is not.
        reach: what one number of the result depends on: its own `element`, its `row` (first axis), or the whole `tensor`.
            Tells how far a tensor may be cut into pieces that fit the cache, and across processes.
        weight_decay: the official default of lambda.
        decay: the official kind of decay: `decoupled`, `independent` or `coupled`.
        variants: rules of the same name by variant (`paper`, `official`), where paper and code differ.
        static: numbers that select a formula rather than scale one; a compiled step is made for their value.
        decays: whether the rule applies `hyper.weight_decay` itself.
        curvature: which sample `observe` expects: `signed` z * (H z), `squared` sampled-label gradients, or none.
        observe: `(state, diagonal, hyper, count) -> state`, folds a curvature sample into the state.
        preconditioner: `(state, hyper, step) -> tensor`: the diagonal D of the step `lr * m / D`.
        statistics: `(param, grad, state, hyper, step) -> {name: 0-d tensor}`: the statistic the rule lives on.
        summary: one line for the list of optimizers.
        source: authors, year, equation or algorithm.
        deviations: where paper, official code and popular collections differ, and what is done here.
        state_bytes: bytes of state per float32 parameter of a matrix.
        passes: extra forward-backward passes per step, as a fraction.
        lr_vs_adamw: the usual range of its learning rate, as a multiple of AdamW's.
    """

    name: str
    hyper: type
    init: Callable[[Tensor, Role, Any], Any]
    update: Callable[[Tensor, Tensor, Any, Any, Any], tuple[Tensor, Any]]
    prepare: Callable[[Tensor, Role], Tensor] | None = None
    begin: Callable[[Any, Tensor, Any], Any] | None = None
    begins_with: Callable[[Tensor, Tensor], Tensor] | None = None
    within: Callable[[Callable[..., tuple[Tensor, Any]], Tensor, Tensor, Any], tuple[Tensor, Any]] | None = None
    again: str = ""
    reach: Reach = "element"
    weight_decay: float = 0.0
    decay: Decay = "decoupled"
    variants: Mapping[str, Rule] = field(default_factory=dict)
    static: tuple[str, ...] = ()
    decays: bool = False
    curvature: Curvature = ""
    observe: Callable[[Any, Tensor, Any, Any], Any] | None = None
    preconditioner: Callable[[Any, Any, Any], Tensor] | None = None
    statistics: Callable[[Tensor, Tensor, Any, Any, Any], dict[str, Tensor]] | None = None
    summary: str = ""
    source: str = ""
    deviations: tuple[str, ...] = ()
    state_bytes: float = 0.0
    passes: float = 0.0
    lr_vs_adamw: tuple[float, float] = (1.0, 1.0)

    def __repr__(self) -> str:
        return f"<rule {self.name}>"


def choose(condition: Any, a: Callable[[], Any], b: Callable[[], Any]) -> Any:
    """`a()` where a condition on numbers holds, else `b()`: for plain numbers, traced ones and tensors alike.

    Example:
        >>> choose(3 > 2, lambda: 1.0, lambda: 0.0)
        1.0
    """
    if isinstance(condition, bool):
        return a() if condition else b()
    return torch.where(condition, a(), b())
