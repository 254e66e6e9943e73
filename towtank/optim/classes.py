"""Torch optimizer classes made of rules, with the keywords of the official implementations."""

from __future__ import annotations

import inspect
from typing import Any

from torch.optim.optimizer import ParamsT

from towtank.optim.optimizer import Optimizer
from towtank.optim.rule import Rule


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
        self.variant = variant
        options = {"weight_decay": chosen.weight_decay, "decay": chosen.decay} | options
        Optimizer.__init__(self, params, chosen, _numbers(chosen) | given, **options)

    signature = inspect.signature(Optimizer.__init__)
    own = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=v) for n, v in numbers.items()]
    common = [p for n, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY]
    extra = inspect.Parameter("variant", inspect.Parameter.KEYWORD_ONLY, default="")
    first = [signature.parameters["self"], signature.parameters["params"]]
    __init__.__signature__ = signature.replace(parameters=[*first, *own, *common, extra])  # pyright: ignore[reportFunctionMemberAccess]
    members = {"__init__": __init__, "__module__": "towtank.optim", "__qualname__": name, "__doc__": _document(rule)}
    members["rules"] = {"": rule, "paper": rule, **rule.variants}
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
