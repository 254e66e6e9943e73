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
static inline T exp@(T x) {{ return {exp}(x); }}
static inline T log@(T x) {{ return log{f}(x); }}
static inline T pow@(T x, T y) {{ return pow{f}(x, y); }}
static inline T fabs@(T x) {{ return fabs{f}(x); }}
static inline T sign@(T x) {{ return (T)((x > 0) - (x < 0)); }}
static inline T square@(T x) {{ return x * x; }}
static inline T reciprocal@(T x) {{ return 1 / x; }}
static inline T sigmoid@(T x) {{ return 1 / (1 + {exp}(-x)); }}
static inline T minimum@(T a, T b) {{ return a < b || a != a ? a : b; }}
static inline T maximum@(T a, T b) {{ return a > b || a != a ? a : b; }}
static inline T lerp@(T a, T b, T w) {{ return w < (T)0.5 ? a + w * (b - a) : b - (b - a) * (1 - w); }}
#undef T
"""


# exp of a float as a polynomial: libm's is called number by number, this one the compiler turns into vectors. Cody-Waite
# reduction and a minimax polynomial (Cephes, Moshier 1992); within 2 units in the last place, 0 and infinity at the ends.
FAST_EXP = """
static inline float exp_fast(float x) {
    const float y = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
    const float n = rintf(y * 1.44269504088896341f);
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int half = (int)n / 2, rest = (int)n - half;  // in two steps, so that no exponent overflows
    union { int i; float f; } a = {(half + 127) << 23}, b = {(rest + 127) << 23};
    return x != x ? x : p * a.f * b.f;
}
"""


def helpers(real: str, end: str) -> str:
    """The small functions that operations are written with, for one type."""
    single = real == "float"
    own = HELPERS.format(real=real, f="f" if single else "", exp="exp_fast" if single else "exp").replace("@", end)
    return FAST_EXP + own if single else own
