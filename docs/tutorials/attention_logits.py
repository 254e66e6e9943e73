"""Attention logits run away at a large learning rate, an alarm says when, and qk-norm prevents it.

A logit of attention is q.k / sqrt(K), the product of two activations: where the weights behind q and k grow, it grows with the
square. Wortsman et al. (2023) found that training diverges where the largest logit passes about 1e4, in large transformers at usual
learning rates and in small ones at large learning rates, so that it can be studied cheaply. The cure is qk-norm: a LayerNorm on every
query and key, which bounds the logit by sqrt(K) times the two gains.

Here towtank's small GPT (0.13 million parameters) reads source code at a learning rate of 0.2, more than ten times the best one, in a
plain loop with a monitor, without and with qk-norm. The monitor reads the largest logit every few steps; its rule "attention logits"
raises an alarm as soon as the trend reaches 1e4 in the near future. Afterwards every forecast that the trend would have given is
compared with what came. Run this file from its folder:

    python attention_logits.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from draw import colour, panels, rule

from towtank.estimate import Interval
from towtank.signals import Alarm, Monitor, every
from towtank.signals.attention import attention
from towtank.signals.forecast import crossing
from towtank.signals.rules import LOGIT_LIMIT
from towtank.train.task import Task
from towtank.train.tasks import gpt

KEY = "attention/max_logit"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: its losses, the largest attention logit now and then, and the alarms about it."""

    qk_norm: bool
    loss: tuple[float, ...]
    step: tuple[int, ...]
    logit: tuple[float, ...]
    alarms: tuple[Alarm, ...]

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return float(np.mean(self.loss[-max(1, len(self.loss) // 10) :]))

    @property
    def crossed(self) -> int | None:
        """The step of the first reading above the limit."""
        return next((s for s, z in zip(self.step, self.logit, strict=True) if z > LOGIT_LIMIT), None)

    def held(self, lead: Interval) -> bool:
        """Whether a forecast has the crossing, which lies between two readings, in its interval."""
        if self.crossed is None:
            return False
        last = max(s for s in self.step if s < self.crossed)
        return lead.high > last and lead.low <= self.crossed

    @property
    def forecasts(self) -> tuple[tuple[int, Interval], ...]:
        """What the trend said at every reading before the crossing: (step at which it was said, step of the crossing)."""
        before = [s for s in self.step if self.crossed is None or s < self.crossed]
        steps, logits = np.array(before, dtype=float), np.array(self.logit[: len(before)])
        said = [(s, crossing(steps[:n], logits[:n], LOGIT_LIMIT)) for n, s in enumerate(before, 1)]
        return tuple((s, lead) for s, lead in said if lead is not None)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The run without and the run with qk-norm, and what they show in a sentence."""

    plain: Run
    normed: Run
    sentence: str


def task(*, width: int, qk_norm: bool, seed: int) -> Task:
    """The model and its data, drawn from a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return gpt(width=width, qk_norm=qk_norm)


def train(
    *, qk_norm: bool, out: Path | None, width: int, lr: float, warmup: int, steps: int, cadence: int, seed: int
) -> Run:
    """Train in a plain loop with linear warm-up and clipping, and watch the attention logits."""
    found = task(width=width, qk_norm=qk_norm, seed=seed)
    model, data, loss_of = found.model, found.data, found.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    folder = out and out / ("qk_norm" if qk_norm else "plain")
    with Monitor(model, optimizer, loss=loss_of, probes=[every(cadence, attention())], out=folder) as monitor:
        for step in range(steps):
            batch = data.batch(seed, step)
            loss = loss_of(model(batch[0]), batch[1])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.step(loss, batch)
            optimizer.zero_grad()
            schedule.step()
    read, logits = monitor.history[KEY]
    return Run(
        qk_norm=qk_norm,
        loss=tuple(monitor.history["train/loss"][1].tolist()),
        step=tuple(int(s) for s in read),
        logit=tuple(logits.tolist()),
        alarms=tuple(a for a in monitor.alarms if a.key == KEY),
    )


def main(
    out: Path | None = None,
    *,
    width: int = 64,
    lr: float = 0.2,
    warmup: int = 100,
    steps: int = 200,
    cadence: int = 5,
    seed: int = 0,
) -> Result:
    """Train without and with qk-norm, and compare the alarm with what came."""
    sizes = {"width": width, "lr": lr, "warmup": warmup, "steps": steps, "cadence": cadence, "seed": seed}
    plain, normed = (train(qk_norm=qk_norm, out=out, **sizes) for qk_norm in (False, True))
    return Result(plain=plain, normed=normed, sentence=f"{_said(plain)}; {_said(normed)}")


def _said(run: Run) -> str:
    name = "with qk-norm" if run.qk_norm else "without qk-norm"
    text = f"{name} the largest attention logit is {max(run.logit):,.3g}, the loss {run.final_loss:.2f}"
    lead = next((a for a in run.alarms if a.lead), None)
    if run.crossed is None or lead is None or lead.lead is None:
        return text + (", no alarm" if not run.alarms else f", {len(run.alarms)} alarms")
    held = [run.held(f) for _, f in run.forecasts]
    return (
        f"{text}; it passes {LOGIT_LIMIT:g} by step {run.crossed}, the alarm at step {lead.step} ({lead.value:.3g}) said step "
        f"{lead.lead.value:.0f} ({lead.lead.low:.0f} to {lead.lead.high:.0f}), and {sum(held)} of {len(held)} forecasts "
        "on the way had the step in their interval"
    )


def figure(result: Result) -> go.Figure:
    """The logits with their limit, and every forecast of the crossing against the step at which it was made."""
    plain = result.plain
    fig = panels(
        [
            ("Largest attention logit", {"title": "step"}, {"title": "q.k / √K", "type": "log"}),
            ("Forecast of the crossing", {"title": "step of the forecast"}, {"title": "step of the crossing"}),
        ]
    )
    for i, run in enumerate((plain, result.normed)):
        name = "with qk-norm" if run.qk_norm else "without qk-norm"
        line = {"color": colour(i), "width": 1.8}
        fig.add_trace(go.Scatter(x=run.step, y=run.logit, name=name, line=line, mode="lines"), 1, 1)
    powers = range(7)
    fig.update_yaxes(tickvals=[10**k for k in powers], ticktext=[f"10<sup>{k}</sup>" for k in powers], row=1, col=1)
    fig.add_shape(rule(y=LOGIT_LIMIT), row=1, col=1)
    for alarm in [a for a in plain.alarms if a.lead][:1]:
        mark = {"color": colour(0), "size": 10, "symbol": "diamond"}
        fig.add_trace(
            go.Scatter(x=[alarm.step], y=[alarm.value], mode="markers", name="first alarm", marker=mark), 1, 1
        )
    if plain.crossed is not None and plain.forecasts:
        top = 2.2 * plain.crossed
        said = [(s, lead) for s, lead in plain.forecasts if math.isfinite(lead.value)]
        bars = {
            "type": "data",
            "array": [min(lead.high, 2 * top) - lead.value for _, lead in said],
            "arrayminus": [lead.value - lead.low for _, lead in said],
            "thickness": 1.2,
            "width": 3,
        }
        x, y = [s for s, _ in said], [lead.value for _, lead in said]
        look = {"mode": "markers", "marker": {"color": colour(0), "size": 6}, "name": "forecast, 95 %"}
        fig.add_trace(go.Scatter(x=x, y=y, error_y=bars, **look), 1, 2)
        fig.add_shape(rule(y=plain.crossed), row=1, col=2)
        fig.update_yaxes(range=[0, top], row=1, col=2)
    return fig


if __name__ == "__main__":
    print(main(Path("runs/attention_logits")).sentence)
