"""The multi-power law: every change of the learning rate takes off (or adds) loss by a power law of what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from towtank.laws.annealing import linear_starts
from towtank.laws.curve_fit import Points
from towtank.laws.curve_law import CurveLaw
from towtank.laws.multipower_nodes import OPEN, Nodes, find_nodes
from towtank.laws.parametric import Parameter, grid
from towtank.laws.schedules import Schedule
from towtank.laws.table import Floats, Ints


@dataclass(frozen=True)
class Path:
    """What the law needs of a schedule: the sum of the rates at each row, and the nodes of the sum over changes."""

    travelled: Floats
    nodes: Nodes
    peak: float


@dataclass(frozen=True, kw_only=True)
class MultiPowerLaw(CurveLaw):
    """L(t) = L0 + A S(t)^-alpha + B sum_{k<=t} (eta_k - eta_{k-1}) (1 - (1 + C eta_k^-gamma (S(t) - S(k-1)))^-beta).

    S is the sum of the rates from step 0 on, warm-up included. The sum over past steps has few terms: steps that change
    nothing are left out, and far ones stand together (`multipower_nodes`).

    Luo et al. 2025, "A multi-power law for loss curve prediction across learning rate schedules", equation 1 (Huber delta
    1e-3 on the log loss).

    Args:
        open_share: largest block of changes that stand together, as a share of its distance; 0 sums every change.

    Example:
        >>> from towtank.laws.schedules import hold
        >>> law = MultiPowerLaw()
        >>> run = hold(1.0, 1).then(hold(0.25, 4))  # one fall, followed by S(t) - S(0) = 1 at step 4
        >>> c = {"L0": 2.0, "A": 1.0, "alpha": 1.0, "B": 1.0, "C": 1.5, "beta": 1.0, "gamma": 0.5}
        >>> round(float(law.value(c, law.features(run, np.array([4]), np.nan))[0][0]), 9)  # 2 + 1 / 2 - 0.75 (1 - 1 / 4)
        1.9375
    """

    open_share: float = OPEN

    name: ClassVar[str] = "multi-power"
    formula: ClassVar[str] = (
        "L = L0 + A S^-alpha + B sum_k (eta_k - eta_k-1) (1 - (1 + C eta_k^-gamma (S - S_k-1))^-beta)"
    )
    variables: ClassVar[Mapping[str, str]] = {"step": "update", "lr": "learning rate of every step"}
    source: ClassVar[str] = "Luo et al. 2025, equation 1"
    needs: ClassVar[str] = "loss curves (curve, step, lr, loss) under three or more schedules, better five"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """L0, A, alpha, B, C, beta, gamma."""
        return (
            Parameter("L0", 0.0, 100.0, log=False), Parameter("A", 1e-9, 1e9), Parameter("alpha", 0.0, 3.0, log=False),
            Parameter("B", 1e-6, 1e12), Parameter("C", 1e-9, 1e9), Parameter("beta", 0.0, 5.0, log=False),
            Parameter("gamma", 0.0, 3.0, log=False),
        )  # fmt: skip

    def features(self, schedule: Schedule, steps: Ints, size: float) -> Path:
        """S at the steps, and the nodes of the sum."""
        nodes = find_nodes(schedule.rates, steps, open_share=self.open_share)
        return Path(np.cumsum(schedule.rates)[steps], nodes, schedule.peak)

    def join(self, features: Sequence[Path]) -> Path:
        """The rows of several schedules as one."""
        rows = [f.travelled.size for f in features]
        nodes = Nodes.join([f.nodes for f in features], rows)
        return Path(np.concatenate([f.travelled for f in features]), nodes, max(f.peak for f in features))

    def value(self, c: Mapping[str, float], features: Path) -> tuple[Floats, dict[str, Floats]]:
        """The formula and its derivatives."""
        s, nodes = features.travelled, features.nodes
        power = s ** -c["alpha"]
        x = np.exp(np.log(c["C"]) - c["gamma"] * nodes.log_rate + nodes.log_travel)
        log1 = np.log1p(x)
        left = nodes.weight * np.exp(-c["beta"] * log1)  # what is still to come of each change
        slow = c["beta"] * left * (x / (1 + x))
        drop = nodes.add_up(nodes.weight - left, s.size)
        slopes = {
            "L0": np.ones_like(s), "A": power, "alpha": -c["A"] * power * np.log(s), "B": drop,
            "C": c["B"] / c["C"] * nodes.add_up(slow, s.size), "beta": c["B"] * nodes.add_up(left * log1, s.size),
            "gamma": -c["B"] * nodes.add_up(slow * nodes.log_rate, s.size),
        }  # fmt: skip
        return c["L0"] + c["A"] * power + c["B"] * drop, slopes

    def starts(self, points: Points) -> dict[str, Floats]:
        """Exponents of a grid, C such that a change is over within a hundredth or a thousandth of the run."""
        peak, end = points.joined.peak, points.joined.travelled.max()
        found = grid(alpha=[0.3, 0.6], C=[100.0, 3000.0], beta=[0.4, 0.8], gamma=[0.3, 0.8])
        found["C"] = found["C"] / end * peak ** found["gamma"]
        return linear_starts(self, points, found, ("L0", "A", "B"))

    def annealed(self, c: Mapping[str, float], features: Path) -> Floats:
        """-B times the sum."""
        return -c["B"] * self.value(c, features)[1]["B"]
