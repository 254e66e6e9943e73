"""Synthetic records of a study whose truth is known."""

from __future__ import annotations

import zlib

import numpy as np

from towtank.record.record import Loss, Record, Stage
from towtank.report.answer import predict

INITIAL = 5.6
SLOPE = {"sp": -0.9, "mup": 0.0}


def optimum(arm: str, width: float) -> float:
    """log2 of the best learning rate."""
    return -5.5 + SLOPE[arm] * np.log2(width / 32)


def run(
    arm: str,
    width: int,
    x: float,
    seed: int,
    *,
    stage: Stage = "grid",
    sd: float = 0.005,
    logit: float | None = None,
    diverged: bool = False,
    final: float | None = None,
    **config: object,
) -> Record:
    """One run at learning rate 2^x; what is random depends on the run alone."""
    key = f"{arm} {width} {x:.4f} {seed} {stage} {config}"
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    offset = np.random.default_rng([width, seed]).normal(0, 0.01)
    loss = 2.42 - 0.08 * np.log2(width / 32) + 0.04 * (x - optimum(arm, width)) ** 2 + offset + rng.normal(0, sd)
    signals = {} if logit is None else {"attention_logit_max": [(0, 1.0), (100, logit), (200, None)]}
    return Record(
        id=f"{zlib.crc32(key.encode()):08x}",
        config={"lr": float(2.0**x), "width": width, "parametrization": arm, "seed": seed, "depth": 2} | config,
        status="diverged" if diverged else "done",
        steps=200,
        loss=Loss(initial=INITIAL, final=None if diverged else float(final if final is not None else loss)),
        signals=signals,
        corpus="c0ffee",
        stage=stage,
        study="lr-transfer",
        parameters=width * 1000,
        time_s=2.0,
        environment={"torch": "2.13.0"},
    )


def grid(arm: str, widths=(32, 64, 128), seeds=(0, 1), rates=range(-10, -2), **more) -> list[Record]:
    """Every rate, width and seed."""
    return [run(arm, w, float(x), s, **more) for w in widths for x in rates for s in seeds]


def verification(records: list[Record], arm: str, width: int = 256, shift: float = 0.0, **more) -> list[Record]:
    """The runs a study would make at the predicted rate of its arm, half and twice it; `shift` octaves beside it."""
    own = [r for r in records if r.config["parametrization"] == arm]
    rate = predict(own, width)[0].lr
    assert rate is not None
    return [
        run(arm, width, float(np.log2(rate.value)) + shift + k, s, stage="verify", **more)
        for k in (-1, 0, 1)
        for s in (0, 1)
    ]
