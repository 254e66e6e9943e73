"""A sample `Answer` with the numbers of a real small study: widths 32..128 in `sp` and `mup`, verified at 256."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from towtank.estimate import Interval, Verdict
from towtank.report.answer import (
    Answer,
    Arm,
    Backtest,
    LawResult,
    Prediction,
    RatePoint,
    RunRow,
    SizeResult,
    Verification,
)

OPTIMA = {"sp": {32: -5.46, 64: -6.285, 128: -7.24}, "mup": {32: -5.46, 64: -5.625, 128: -5.725}}
BEST = {"sp": {32: 2.421, 64: 2.256, 128: 2.205}, "mup": {32: 2.421, 64: 2.298, 128: 2.206}}
SLOPES = {"sp": Interval(-0.89, -1.02, -0.75), "mup": Interval(-0.13, -0.26, 0.01)}
PREDICTED = {"sp": (-8.11, -8.45, -7.78), "mup": (-5.87, -6.2, -5.55)}
MEASURED = {"sp": (-8.31, -8.46, -8.15), "mup": (-5.77, -5.95, -5.6)}
FINAL = {"sp": 2.112, "mup": 2.1}
PARAMETERS = {32: 43_264, 64: 135_168, 128: 468_992, 256: 1_722_368}
LOGITS = {32: 13.0, 64: 17.0, 128: 18.0, 256: 19.5}


def log2_interval(value: float, low: float, high: float) -> Interval:
    """An interval given by the base-2 logarithms of its ends."""
    return Interval(2.0**value, 2.0**low, 2.0**high)


def loss(best: float, distance: float) -> float:
    """Loss `distance` octaves from the optimum: steeper above it than below, as measured."""
    return best + (0.040 if distance > 0 else 0.030) * distance**2 / (1 + 0.08 * abs(distance))


def logit(width: int, lr: float) -> float:
    """Largest attention logit with normalized queries and keys: grows slowly with both."""
    return 3.2 * (LOGITS[width] / 3.2) ** ((math.log2(lr) + 10) / 7)


def rate_point(arm: str, width: int, exponent: int, optimum: float, best: float) -> RatePoint:
    """Two seeds at one learning rate; the widest `sp` models diverge at the largest one."""
    lr = 2.0**exponent
    wobble = 0.006 * math.sin(7.3 * exponent + width)
    if arm == "sp" and width >= 128 and exponent == -3:
        return RatePoint(lr=lr, loss=None, stderr=None, runs=2, diverged=2, attention_logit_max=None)
    some = 1 if arm == "sp" and width == 64 and exponent == -3 else 0
    value = loss(best, exponent - optimum) + wobble
    error = None if some else 0.004 + 0.003 * abs(math.cos(exponent))
    return RatePoint(lr=lr, loss=value, stderr=error, runs=2, diverged=some, attention_logit_max=logit(width, lr))


def size_result(arm: str, width: int) -> SizeResult:
    """One width, its curve, its fit."""
    optimum, best = OPTIMA[arm][width], BEST[arm][width]
    steps = [optimum + 0.1 * i for i in range(-14, 15)]
    return SizeResult(
        size=width,
        parameters=PARAMETERS[width],
        rates=tuple(rate_point(arm, width, e, optimum, best) for e in range(-10, -2)),
        optimum=log2_interval(optimum, optimum - 0.22, optimum + 0.25),
        best_loss=Interval(best, best - 0.008, best + 0.009),
        verdict=Verdict("ok"),
        sensitivity={"sp": 0.21, "mup": 0.14}[arm] + 0.02 * math.log2(width / 32),
        fitted=tuple((2.0**s, best + 0.034 * (s - optimum) ** 2) for s in steps),
    )


def lr_law(arm: str) -> LawResult:
    """The law of the learning rate, with the backtest that hides width 128."""
    target, low, high = PREDICTED[arm]
    slope = SLOPES[arm]
    mean = sum(OPTIMA[arm].values()) / 3
    middles = [mean + slope.value * (math.log2(w) - 6) for w in (32, 64, 128)] + [target]
    widths = [0.13, 0.1, 0.16, high - target]
    line = [(float(w), log2_interval(m, m - d, m + d)) for w, m, d in zip(LOGITS, middles, widths, strict=True)]
    hidden = 2 * OPTIMA[arm][64] - OPTIMA[arm][32]
    predicted = log2_interval(hidden, hidden - 0.5, hidden + 0.5)
    measured = log2_interval(OPTIMA[arm][128], OPTIMA[arm][128] - 0.22, OPTIMA[arm][128] + 0.25)
    factor = 2 ** abs(hidden - OPTIMA[arm][128])
    return LawResult(
        name="learning rate",
        coefficients={"slope": slope, "intercept": Interval(mean - 6 * slope.value, mean - 7, mean + 7)},
        points=tuple((float(w), log2_interval(v, v - 0.22, v + 0.25)) for w, v in OPTIMA[arm].items()),
        line=tuple(line),
        verdict=Verdict("ok"),
        backtest=Backtest(size=128, predicted=predicted, measured=measured, factor=factor, hit=True),
    )


def _law(
    name: str,
    coefficients: dict[str, Interval],
    points: list[tuple[float, Interval]],
    line: list[tuple[float, Interval]],
    verdict: Verdict,
    backtest: Backtest | None,
) -> LawResult:
    return LawResult(
        name=name,
        coefficients=coefficients,
        points=tuple(points),
        line=tuple(line),
        verdict=verdict,
        backtest=backtest,
    )


def loss_law(arm: str) -> LawResult:
    """Best loss against size."""
    points = [(float(w), Interval(v, v - 0.008, v + 0.009)) for w, v in BEST[arm].items()]
    line = [*points, (256.0, Interval(FINAL[arm] + 0.02, FINAL[arm] - 0.06, FINAL[arm] + 0.1))]
    hidden = Interval(BEST[arm][64] - 0.1, BEST[arm][64] - 0.16, BEST[arm][64])
    test = Backtest(
        size=128, predicted=hidden, measured=points[2][1], factor=points[2][1].value / hidden.value, hit=True
    )
    slope = {"slope": Interval(-0.055, -0.08, -0.03)}
    verdict = Verdict("weak", "three sizes: no check of the form of the law")
    return _law("best loss", slope, points, line, verdict, test)


def attention_law(exponent: int) -> LawResult:
    """The largest attention logit at one learning rate."""
    values = {w: logit(w, 2.0**exponent) for w in LOGITS}
    points = [(float(w), Interval(v, 0.9 * v, 1.1 * v)) for w, v in values.items() if w < 256]
    line = [(float(w), Interval(v, 0.7 * v, 1.4 * v)) for w, v in values.items()]
    slope = {"slope": Interval(0.2, 0.1, 0.35)}
    name = f"attention logit at lr {2.0**exponent:.3g}"
    return _law(name, slope, points, line, Verdict("weak", "three sizes"), None)


def verification(arm: str) -> Verification:
    """Width 256 at the predicted rate, half and twice it."""
    predicted, measured = log2_interval(*PREDICTED[arm]), log2_interval(*MEASURED[arm])
    rates = []
    for shift in (-1, 0, 1):
        distance = PREDICTED[arm][0] + shift - MEASURED[arm][0]
        value, lr = loss(FINAL[arm], distance), predicted.value * 2.0**shift
        rates.append(RatePoint(lr=lr, loss=value, stderr=0.005, runs=2, diverged=0, attention_logit_max=logit(256, lr)))
    return Verification(
        size=256,
        predicted=predicted,
        measured=measured,
        rates=tuple(rates),
        factor=2 ** abs(PREDICTED[arm][0] - MEASURED[arm][0]),
        excess_loss=rates[1].loss - FINAL[arm] if rates[1].loss else None,
        held=True,
        reason="the measured optimum lies inside the predicted interval",
    )


def arm(name: str) -> Arm:
    """One parametrization."""
    lr = log2_interval(*PREDICTED[name])
    prediction = Prediction(
        arm=name,
        size=256,
        lr=lr,
        loss=Interval(FINAL[name] + 0.02, FINAL[name] - 0.06, FINAL[name] + 0.1),
        attention_logit_max=Interval(9.5, 7.1, 13.0),
        stable=True,
        verdict=Verdict("ok"),
    )
    return Arm(
        name=name,
        settings={"parametrization": name},
        sizes=tuple(size_result(name, w) for w in (32, 64, 128)),
        lr_law=lr_law(name),
        loss_law=loss_law(name),
        attention_laws=tuple(attention_law(e) for e in (-8, -6, -4)),
        prediction=prediction,
        verification=verification(name),
    )


def runs(arms: tuple[Arm, ...]) -> tuple[RunRow, ...]:
    """Every run of the arms, two seeds each."""
    rows = []
    for a in arms:
        curves = [("grid", s.size, s.rates) for s in a.sizes]
        curves += [("verify", a.verification.size, a.verification.rates)] if a.verification else []
        for stage, size, points in curves:
            for p in points:
                for seed in range(p.runs):
                    rows.append(_run(a.name, stage, size, p, seed))
    return tuple(rows)


def _run(name: str, stage: str, size: float, p: RatePoint, seed: int) -> RunRow:
    bad = seed < p.diverged
    return RunRow(
        id=f"{abs(hash((name, size, p.lr, seed))):016x}"[:16],
        arm=name,
        stage=stage,
        size=size,
        lr=p.lr,
        seed=seed,
        status="diverged" if bad else "done",
        steps=86 if bad else 200,
        loss=None if bad or p.loss is None else p.loss + 0.004 * (1 - 2 * seed),
        attention_logit_max=p.attention_logit_max,
        time_s=0.05 * size,
        reason="loss is not finite at step 86" if bad else "",
    )


def count(rows: tuple[RunRow, ...]) -> dict[str, int]:
    """Runs by status."""
    return dict(Counter(r.status for r in rows))


def answer() -> Answer:
    """The sample as a whole."""
    arms = (arm("sp"), arm("mup"))
    rows = runs(arms)
    return Answer(
        study="lr-transfer",
        question="Which learning rate should the wide model use, and does the best one of a small model carry over?",
        sentence="At width 256 use learning rate 0.00362 [0.00286, 0.00455] in sp and 0.0171 [0.0136, 0.0213] in mup; "
        "trained there, both predictions held (off by a factor of 1.15 and 1.07).",
        verdict=Verdict("ok"),
        size_axis="width",
        target=256,
        arms=arms,
        runs=rows,
        counts=count(rows),
        fixed={"depth": 2, "qk_norm": True, "z_loss": 1e-4, "steps": 200, "batch": 8, "context": 64, "warmup": 20},
        environment={"towtank": "0.1.0", "torch": "2.13.0", "python": "3.11", "cpu": "2 cores", "device": "cpu"},
        corpus="9f2c1a7be0d4",
        time_s=sum(r.time_s for r in rows),
        reproduce=("towtank sweep lr-transfer --out runs/lr-transfer", "towtank report runs/lr-transfer"),
        warnings=(),
    )


def refused() -> Answer:
    """An answer that cannot be told: everything diverged in one arm, the optimum at the edge in the other."""
    why = Verdict("refuse", "the best learning rate is the smallest of the grid; try lr = {log2 = [-14, -10]}")
    bad = replace(arm("sp"), lr_law=None, loss_law=None, attention_laws=(), prediction=None, verification=None)
    lost = [
        RatePoint(lr=2.0**e, loss=None, stderr=None, runs=1, diverged=1, attention_logit_max=None) for e in (-4, -3)
    ]
    none = SizeResult(
        size=32, parameters=None, rates=tuple(lost), optimum=None, best_loss=None, verdict=why, sensitivity=None
    )
    edge = tuple(replace(s, optimum=None, best_loss=None, fitted=(), verdict=why) for s in bad.sizes)
    arms = (replace(bad, sizes=edge), replace(bad, name="mup", sizes=(none,)))
    rows = runs(arms)
    return replace(
        answer(), arms=arms, runs=rows, counts=count(rows), sentence=f"Cannot tell: {why.reason}.", verdict=why
    )


def empty() -> Answer:
    """No record was found."""
    why = Verdict("refuse", "no finished run")
    return replace(
        answer(), arms=(), runs=(), counts={}, sentence="Cannot tell: no finished run.", verdict=why, target=None
    )


def hostile(name: str) -> Answer:
    """The sample with `name` in every place where text of the user or of a machine ends up."""
    one = answer()
    verdict = Verdict("weak", name)
    arms = []
    for a in one.arms:
        sizes = tuple(replace(s, verdict=verdict) for s in a.sizes)
        law = replace(a.lr_law, name=name, verdict=verdict, coefficients={name: SLOPES["sp"]}) if a.lr_law else None
        logits = tuple(replace(law, name=f"{name} {i}") for i, law in enumerate(a.attention_laws))
        checked = replace(a.verification, reason=name, held=False) if a.verification else None
        predicted = replace(a.prediction, arm=name, verdict=verdict) if a.prediction else None
        changed = {
            "sizes": sizes,
            "lr_law": law,
            "attention_laws": logits,
            "verification": checked,
            "prediction": predicted,
        }
        arms.append(replace(a, name=f"{name} {a.name}", settings={name: name}, **changed))
    rows = tuple(replace(r, id=name, arm=name, stage=name, status=name, reason=name) for r in one.runs)
    words = {"study": name, "question": name, "sentence": name, "size_axis": name, "corpus": name}
    lists = {"reproduce": (name,), "warnings": (name,), "counts": {name: 3}}
    pairs = {"fixed": {name: name}, "environment": {name: name}}
    return replace(one, verdict=verdict, arms=tuple(arms), runs=rows, **words, **lists, **pairs)
