"""Laws of what grows or fades with size until training fails: attention logits and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from towtank.estimate import Interval
from towtank.laws.law import PowerLaw, SizeLaw
from towtank.laws.loglog import Measured
from towtank.laws.size_fit import SizeFit
from towtank.laws.table import Table

LOGIT_LIMIT = 1e4  # every run whose law lay above it diverged: Wortsman et al. 2023, section 3.3
EPSILON_MARGIN = 10.0  # gradients within this factor of Adam's epsilon shrink the update noticeably


@dataclass(frozen=True, kw_only=True)
class AttentionLogitLaw(SizeLaw):
    """Largest attention logit against size at one learning rate, and the size at which it makes training fail.

    A line and a quadratic in log-log are pooled; their spread is part of every interval. Measure the largest logit of the
    first block early in training (step 2000 in the source), without query-key normalization.

    Args:
        limit: the logit above which training fails.

    Example:
        >>> fit = AttentionLogitLaw().fit({"n": [1e6, 1e7, 1e8, 1e9], "logit": [1, 10, 100, 1000]}, x="n", y="logit")
        >>> 0.9e10 < AttentionLogitLaw().fails(fit).value < 1.1e10
        True
    """

    limit: float = LOGIT_LIMIT

    name: ClassVar[str] = "attention-logit"
    degrees: ClassVar[tuple[int, ...]] = (1, 2)
    formula: ClassVar[str] = "log2 logit = a + b log2 N (+ c log2^2 N), fails where logit > 1e4"
    source: ClassVar[str] = "Wortsman et al. 2023, section 3.3"
    needs: ClassVar[str] = "largest attention logit of runs at 4 or more sizes, at one learning rate"

    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """Mean of log2 logit per size."""
        return PowerLaw().measure(table, x, y, weights, seed)

    def fails(self, fit: SizeFit) -> Interval | None:
        """The size at which the logits reach the limit; None if they do not within 1024 times the largest size."""
        return fit.crossing(self.limit)


@dataclass(frozen=True, kw_only=True)
class GradientRMSLaw(SizeLaw):
    """Root mean square of a gradient against size, and the size at which Adam's epsilon starts to swallow it.

    A line and a quadratic in log-log are pooled. Take one tensor (the first MLP matrix of the first block in the source),
    averaged over the last steps.

    Args:
        epsilon: of the optimizer.
        margin: the gradient is too small within this factor of epsilon.

    Example:
        >>> fit = GradientRMSLaw().fit({"n": [1e6, 1e7, 1e8, 1e9], "rms": [1e-3, 1e-4, 1e-5, 1e-6]}, x="n", y="rms")
        >>> 0.9e10 < GradientRMSLaw().fails(fit).value < 1.1e10
        True
    """

    epsilon: float = 1e-8
    margin: float = EPSILON_MARGIN

    name: ClassVar[str] = "gradient-rms"
    degrees: ClassVar[tuple[int, ...]] = (1, 2)
    formula: ClassVar[str] = "log2 rms = a + b log2 N (+ c log2^2 N), fails where rms < 10 eps"
    source: ClassVar[str] = "Wortsman et al. 2023, section 3.4"
    needs: ClassVar[str] = "gradient RMS of one tensor at 4 or more sizes, at one learning rate"

    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """Mean of log2 RMS per size."""
        return PowerLaw().measure(table, x, y, weights, seed)

    def fails(self, fit: SizeFit) -> Interval | None:
        """The size at which the gradient falls to `margin * epsilon`; None if not within 1024 times the largest size."""
        return fit.crossing(self.margin * self.epsilon, falling=True)
