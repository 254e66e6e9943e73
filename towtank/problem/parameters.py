"""Which parameters vary: by name, glob or predicate; tied ones once, frozen ones left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None
_GLOB = set("*?[")


def select(model: nn.Module, wanted: Selection) -> dict[str, nn.Parameter]:
    """The parameters that vary, by their first name, in the order of the model.

    Args:
        model: the network.
        wanted: names and globs, a predicate of name and parameter, or None for every parameter that requires a gradient.

    Raises:
        ValueError: if a name or glob matches nothing, a parameter asked for by name is frozen, or nothing is left.
        TypeError: if a parameter is complex, or not initialized.
    """
    every = dict(model.named_parameters())
    names = set(every) if wanted is None else _wanted(model, every, wanted)
    chosen = {n: p for n, p in every.items() if n in names and p.requires_grad}
    if not chosen:
        kinds = ", ".join(f"{n} ({p.dtype}, frozen)" for n, p in list(every.items())[:4]) or "none at all"
        raise ValueError(
            f"expected at least one parameter that requires a gradient, got {kinds} in {type(model).__name__}; "
            "call requires_grad_(True) on what should vary, or widen params="
        )
    for name, p in chosen.items():
        if nn.parameter.is_lazy(p):
            raise TypeError(f"expected an initialized parameter, got a lazy {name}; run the model on one batch first")
        if not p.dtype.is_floating_point:
            raise TypeError(
                f"expected real floating-point parameters, got {name} of {p.dtype}; "
                "freeze it with requires_grad_(False) or leave it out of params="
            )
    return chosen


def padding_rows(model: nn.Module) -> dict[str, int]:
    """The rows of embeddings that training holds fixed: {name of the weight: padding_idx}.

    Of a weight that is used elsewhere too (a tied head), training moves that row, so it varies like any other.
    """
    users: dict[int, int] = {}
    for m in model.modules():
        for p in m._parameters.values():
            users[id(p)] = users.get(id(p), 0) + 1
    padded = {id(m.weight): m.padding_idx for m in model.modules() if type(m) is nn.Embedding}
    alone = {i: row for i, row in padded.items() if row is not None and users[i] == 1}
    return {n: alone[id(p)] for n, p in model.named_parameters() if id(p) in alone}


def _wanted(model: nn.Module, every: dict[str, nn.Parameter], wanted: Selection) -> set[str]:
    if callable(wanted):
        return {n for n, p in every.items() if wanted(n, p)}
    patterns = [wanted] if isinstance(wanted, str) else list(wanted or ())
    first = {id(p): n for n, p in every.items()}
    aliases = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"expected names, globs or a predicate as params, got {type(pattern).__name__}")
        hits = {aliases[n] for n in aliases if n == pattern or (_GLOB & set(pattern) and fnmatchcase(n, pattern))}
        if not hits:
            raise ValueError(f"expected params to match a parameter, got {pattern!r}; there are {', '.join(every)}")
        if pattern in aliases and not every[aliases[pattern]].requires_grad:
            p = every[aliases[pattern]]
            cure = (
                "call requires_grad_(True) on it" if p.dtype.is_floating_point else f"it is of {p.dtype}, leave it out"
            )
            raise ValueError(f"expected parameters that require a gradient, got {pattern}, which is frozen; {cure}")
        chosen |= hits
    return chosen
