"""Quantities that towtank and Cockpit both give, each beside its error: part of `bench/monitor.py`.

All are of the MLP 784-512-512-10 before its first step, on its first batch of 256. The truths share no code with any system measured.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from curvature_cases import Case, Reference
from monitor_cases import Peer, Workload, mean_loss
from torch import Tensor, nn

from towtank.signals import look


def truths(work: Workload) -> dict[str, float]:
    """Of the MLP on its first batch, in float64 and by formulas for layers: no code of any system measured."""
    model, (x, y) = copy.deepcopy(work.model).double(), work.batches[0]
    case = Case("mlp", model, x, y)
    trace = 0.0
    W = [m.weight.detach() for m in model if isinstance(m, nn.Linear)]  # pyright: ignore[reportGeneralTypeIssues]
    b = [m.bias.detach() for m in model if isinstance(m, nn.Linear)]  # pyright: ignore[reportGeneralTypeIssues]
    inputs, z = [x.double()], x.double() @ W[0].T + b[0]
    for i in (1, 2):
        inputs.append(z.relu())
        z = inputs[-1] @ W[i].T + b[i]
    p = z.softmax(-1)

    def norms(delta: Tensor) -> Tensor:
        """|J_i^T delta_i|^2 of each example i: a layer's is |delta|^2 (|input|^2 + 1)."""
        found = torch.zeros(len(delta), dtype=torch.float64)
        for i in (2, 1, 0):
            found += delta.square().sum(-1) * (inputs[i].square().sum(-1) + 1)
            delta = (delta @ W[i]) * (inputs[i] > 0)
        return found

    squares = norms(p - nn.functional.one_hot(y, p.shape[1]))
    for k in range(p.shape[1]):  # diag(p) - p p^T is the sum over k of s s^T, s = sqrt(p_k) (e_k - p)
        e = torch.zeros_like(p)
        e[:, k] = 1
        trace += float(norms(p[:, k : k + 1].sqrt() * (e - p)).mean())
    reference = Reference(case)
    g2, n = float(reference.gradient.detach().square().sum()), len(x)
    return {
        "gradient norm": math.sqrt(g2),
        "largest eigenvalue": reference.largest(),
        "trace of the Hessian": trace,  # ReLU networks: the diagonals of H and of Gauss-Newton are the same
        "norm test": math.sqrt((float(squares.mean()) - g2) / (n - 1) / g2),
    }


def own_values(work: Workload) -> dict[str, dict[str, float]]:
    """{quantity: its row} by towtank's probes, each from nothing; `stated` is the error that the probe itself says, relative."""
    from towtank.signals.noise import coherence
    from towtank.signals.sgd_stability import curvature_trace
    from towtank.signals.stability import sharpness

    model = copy.deepcopy(work.model)
    optimizer, batch = work.optimizer(model), work.batches[0]
    n = len(batch[0])

    def looked(probe: Callable[[Any], Any], key: str) -> dict[str, float]:
        began = time.process_time()
        said = probe(look(model, mean_loss, batch, optimizer, checks=False))
        cpu, value = time.process_time() - began, float(said[key])
        return {"value": value, "stated": float(said.get(f"{key}_error", math.nan)) / value, "cpu_s": cpu}

    def norm(step: Any) -> dict[str, float]:
        return {"norm": math.sqrt(sum(float(g.norm()) ** 2 for g in step.gradients.values()))}

    found = looked(coherence(), "noise/coherence")
    theta = math.sqrt((1 / found["value"] - 1) / (n - 1))  # of the norm test, by the coherence over all pairs
    return {
        "gradient norm": looked(norm, "norm"),
        "largest eigenvalue": looked(sharpness(), "curvature/sharpness"),
        "trace of the Hessian": looked(curvature_trace(), "curvature/trace"),
        "norm test": found | {"value": theta},
    }


def value_rows(work: Workload, peer: Peer | None) -> list[dict[str, Any]]:
    """Every quantity by both, each with its error."""
    wanted, own = truths(work), own_values(work)
    rows: list[dict[str, Any]] = [
        {"quantity": k, "who": "towtank", "error": abs(r["value"] / wanted[k] - 1)} | r for k, r in own.items()
    ]
    if peer is None:
        return rows
    said = peer.ask("values", 1)
    if "error" in said:
        return [*rows, {"quantity": "all", "who": "Cockpit, full", "note": said["error"]}]
    raw = said["values"]
    theirs = {
        "gradient norm": math.hypot(*raw["GradNorm"]),
        "largest eigenvalue": raw["HessMaxEV"],
        "trace of the Hessian": sum(raw["HessTrace"]),
        "norm test": raw["NormTest"],
    }
    both = f"one step of its full configuration: {said['cpu_s']:.1f} s"
    return rows + [
        {"quantity": k, "who": "Cockpit", "value": v, "error": abs(v / wanted[k] - 1), "note": both}
        for k, v in theirs.items()
    ]
