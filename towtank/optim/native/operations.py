"""What an operation of a rule is in C."""

from __future__ import annotations

from collections.abc import Callable


def _infix(symbol: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {symbol} {b})"


def _call(name: str) -> Callable[..., str]:
    return lambda *a: f"{name}({', '.join(a)})"


def _clamp(x: str, min: str | None = None, max: str | None = None) -> str:
    low = x if min is None else f"({x} < {min} ? {min} : {x})"
    return low if max is None else f"({low} > {max} ? {max} : {low})"


# `@` becomes _r for the tensors' type and _n for numbers, which are double. NaN passes through each as it does in torch.
OPERATIONS: dict[str, Callable[..., str]] = {
    **{n: _infix(s) for n, s in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "div": "/"}.items()},
    **{n: _infix(s) for n, s in {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}.items()},
    **{n: _infix(s) for n, s in {"and_": "&&", "or_": "||", "logical_and": "&&", "logical_or": "||"}.items()},
    **{n: _call(f"{n}@") for n in ("sqrt", "exp", "log", "pow", "sign", "square", "reciprocal", "sigmoid", "lerp")},
    **{n: _call(f"{n}@") for n in ("minimum", "maximum")},
    "abs": _call("fabs@"),
    "rsqrt": lambda x: f"(1 / sqrt@({x}))",
    "neg": lambda x: f"(-{x})",
    "where": lambda c, a, b: f"({c} ? {a} : {b})",
    "clamp": _clamp,
    "clip": _clamp,
}
HELPERS = """
#define T {real}
static inline T sqrt@(T x) {{ return sqrt{f}(x); }}
static inline T exp@(T x) {{ return exp{f}(x); }}
static inline T log@(T x) {{ return log{f}(x); }}
static inline T pow@(T x, T y) {{ return pow{f}(x, y); }}
static inline T fabs@(T x) {{ return fabs{f}(x); }}
static inline T sign@(T x) {{ return (T)((x > 0) - (x < 0)); }}
static inline T square@(T x) {{ return x * x; }}
static inline T reciprocal@(T x) {{ return 1 / x; }}
static inline T sigmoid@(T x) {{ return 1 / (1 + exp{f}(-x)); }}
static inline T minimum@(T a, T b) {{ return a < b || a != a ? a : b; }}
static inline T maximum@(T a, T b) {{ return a > b || a != a ? a : b; }}
static inline T lerp@(T a, T b, T w) {{ return w < (T)0.5 ? a + w * (b - a) : b - (b - a) * (1 - w); }}
#undef T
"""


def helpers(real: str, end: str) -> str:
    """The small functions that operations are written with, for one type."""
    return HELPERS.format(real=real, f="f" if real == "float" else "").replace("@", end)
