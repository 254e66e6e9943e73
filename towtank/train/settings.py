"""What decides a training run besides the model and the data (no torch in here, so that files can be checked without it)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from towtank.optim import OPTIMIZERS

Schedule = Literal["cosine", "linear", "wsd", "constant"]
Decay = Literal["independent", "coupled"]
Parametrization = Literal["sp", "mup"]
Compile = Literal["auto", "always", "never"]
Precision = Literal["float32", "float64"]
# The rates of muP are those of updates whose size does not depend on the size of the gradient.
MUP_OPTIMIZERS = ("AdaBelief", "AdamP", "AdamW", "DiffGrad", "EXAdam", "Lion")


@dataclass(frozen=True, kw_only=True)
class Member:
    """The numbers in which members of one ensemble may differ.

    Args:
        lr: peak learning rate of the schedule.
        weight_decay: lambda; see `Training.decay` for what it multiplies.
        beta1: decay of AdamW's first moment; another optimizer's number of that name, if it has one.
        beta2: decay of AdamW's second moment; as `beta1`.
        eps: AdamW's epsilon, added to the root of the second moment; as `beta1`.
        z_loss: coefficient of mean (log Z)^2 of the output logits; 0 turns it off.
        clip: largest global gradient norm; infinity turns clipping off.
        seed: seed of the initialization and of the order of the data.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    lr: float
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    z_loss: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", self.lr, "a positive number")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(0 <= self.beta1 < 1, "beta1", self.beta1, "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "0 <= beta2 < 1")
        _require(self.eps >= 0, "eps", self.eps, "0 or more")
        _require(self.z_loss >= 0, "z_loss", self.z_loss, "0 or more")
        _require(self.clip > 0, "clip", self.clip, "a positive number, or inf")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings all members of one ensemble share.

    Args:
        steps: number of updates.
        warmup: share of the steps spent on the linear warm-up, 0 to 1.
        schedule: shape after the warm-up: `cosine`, `linear`, `wsd` (constant, then linear over `decay_share`), `constant`.
        final_lr: learning rate at the end as a share of the peak.
        decay_share: share of the steps in the decay of `wsd`.
        decay: `independent` (p -= s_t * lambda * p) or `coupled` (p -= s_t * lr * lambda * p, as in torch.optim.AdamW).
        parametrization: `sp` or `mup`; the rules are in `towtank.scaling.plan`.
        base_width: value of the size key at which `mup` equals `sp`.
        size_key: the argument of the task that says how wide a model is; a study sets it to its `size`.
        eval_every: steps between held-out evaluations; 0 means at the start and at the end only.
        signal_every: steps between recordings of the signals.
        diverged_at: a member whose loss exceeds this multiple of its initial loss has diverged.
        compile: whether to compile the gradient: `auto` (where it repays its compile time), `always` or `never`.
        precision: floating-point type of parameters and arithmetic.
        optimizer: public name of a rule of `towtank.optim`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    steps: int = 200
    warmup: float = 0.1
    schedule: Schedule = "cosine"
    final_lr: float = 0.0
    decay_share: float = 0.2
    decay: Decay = "independent"
    parametrization: Parametrization = "sp"
    base_width: int = 32
    size_key: str = "width"
    eval_every: int = 0
    signal_every: int = 20
    diverged_at: float = 4.0
    compile: Compile = "auto"
    precision: Precision = "float32"
    optimizer: str = field(default="AdamW", metadata={"choices": tuple(OPTIMIZERS)})

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "1 or more")
        _require(0 <= self.warmup <= 1, "warmup", self.warmup, "a share between 0 and 1")
        _require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "a share between 0 and 1")
        _require(0 <= self.decay_share <= 1, "decay_share", self.decay_share, "a share between 0 and 1")
        _require(self.base_width >= 1, "base_width", self.base_width, "1 or more")
        _require(self.eval_every >= 0, "eval_every", self.eval_every, "0 or more")
        _require(self.signal_every >= 1, "signal_every", self.signal_every, "1 or more")
        _require(self.diverged_at > 1, "diverged_at", self.diverged_at, "more than 1")
        for name, kind in (
            ("schedule", Schedule),
            ("decay", Decay),
            ("parametrization", Parametrization),
            ("compile", Compile),
            ("precision", Precision),
        ):
            value = getattr(self, name)
            _require(value in get_args(kind), name, value, " | ".join(get_args(kind)))
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, " | ".join(OPTIMIZERS))
        mup = self.parametrization != "mup" or self.optimizer in MUP_OPTIMIZERS
        _require(mup, "optimizer", self.optimizer, f"{' | '.join(MUP_OPTIMIZERS)} under mup; take sp for the others")


MEMBER_KEYS = frozenset(f.name for f in fields(Member))
TRAINING_KEYS = frozenset(f.name for f in fields(Training))
LATER_KEYS = frozenset({"optimizer"})  # in a cell only where somebody sets them: runs made before keep their identity


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r}: expected {allowed}")
