"""What every tensor of the network does: gradient, size, update, and whether Adam's epsilon swallows it.

RMS: root of the mean square of the entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.signals.readings import norms
from towtank.signals.step import CannotTell, Readings, Step


@dataclass(frozen=True)
class Tensors:
    """RMS of each tensor's gradient, value and update, and the update as a share of the value.

    - grad/rms: of the gradient that the optimizer used
    - parameter/rms: of the value after the step
    - update/rms, update/ratio: of the step, and RMS(step) / RMS(value before it)
    - update/ratio_max, update/ratio_median: over matrices, whose values do not start at zero as biases do

    A ratio of about 1e-3 a step is usual; near 1 a step replaces what was learned.

    Example:
        >>> from towtank.signals.once import look
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> step = look(model, torch.nn.functional.mse_loss, (torch.ones(1, 2), torch.zeros(1, 1)))
        >>> {k: float(v) for k, v in tensors()(step).items()}  # g = 2 (w.x - y) x = 8
        {'grad/rms/weight': 8.0, 'parameter/rms/weight': 2.0}
    """

    needs: frozenset[str] = frozenset({"updates"})
    name: str = "tensors"

    def __call__(self, step: Step) -> Readings:
        """The readings of a step."""
        gradients, parameters = _rms(step.gradients), _rms(step.parameters)
        found = {f"grad/rms/{n}": x for n, x in gradients.items()}
        found |= {f"parameter/rms/{n}": x for n, x in parameters.items()}
        if not step.stepped or step.optimizer is None or "updates" not in step.recorded:
            return found
        updates, before = _rms(step.updates), _rms({n: step.parameters[n] - u for n, u in step.updates.items()})
        found |= {f"update/rms/{n}": x for n, x in updates.items()}
        ratios = {n: x / before[n] for n, x in updates.items()}
        found |= {f"update/ratio/{n}": x for n, x in ratios.items()}
        matrices = [x for n, x in ratios.items() if step.parameters[n].ndim > 1]
        if matrices:
            stacked = torch.stack(matrices).nan_to_num(posinf=torch.inf)  # 0 / 0: a zero tensor that stays
            found |= {"update/ratio_max": stacked.max(), "update/ratio_median": stacked.median()}
        return found


def tensors() -> Tensors:
    """See `Tensors`."""
    return Tensors()


def _rms(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = zip(named.items(), norms(list(named.values())), strict=True)
    return {n: norm / max(x.numel(), 1) ** 0.5 for (n, x), norm in found}


@dataclass(frozen=True)
class Clipping:
    """The gradient's norm before clipping, and the share that clipping leaves of it.

    - grad/norm_before_clip: of all parameters together
    - grad/clip_share: norm that the optimizer used over norm before, 1 where nothing was clipped
    """

    needs: frozenset[str] = frozenset({"raw_norms"})
    name: str = "clipping"

    def __call__(self, step: Step) -> Readings:
        """The readings of a step."""
        if not step.gradients or not step.raw_norms:
            return {}
        before = torch.linalg.vector_norm(torch.stack(list(step.raw_norms.values())))
        used = _rms(step.gradients)
        sizes = [step.gradients[n].numel() ** 0.5 for n in used]
        after = torch.linalg.vector_norm(torch.stack([x * size for x, size in zip(used.values(), sizes, strict=True)]))
        return {"grad/norm_before_clip": before, "grad/clip_share": after / before}


def clipping() -> Clipping:
    """See `Clipping`."""
    return Clipping()


@dataclass(frozen=True)
class Epsilon:
    """How far Adam's denominator stands above its epsilon: RMS(sqrt(v / (1 - beta2^t))) / eps, tensor by tensor.

    Adam moves by m / (sqrt(v) + eps). Where the gradient's RMS is near eps the step shrinks and the tensor stops learning. Matrices
    with a gradient count; the gradient of a bias may be nothing but rounding, as before a normalization that takes it out again.
    The smallest ratio is "stability/epsilon_ratio".

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters(), eps=1e-2)
        >>> (3 * model.weight).sum().backward(); optimizer.step()
        >>> step = Step(number=1, loss=torch.zeros(()), model=model, optimizer=optimizer)
        >>> round(float(epsilon()(step)["stability/epsilon_ratio"]), 3)
        300.0

    Source: Wortsman et al. 2023, section 3.4.
    """

    name: str = "epsilon"

    def __call__(self, step: Step) -> Readings:
        """The readings of a step.

        Raises:
            CannotTell: if the optimizer has no squared averages or no epsilon.
        """
        if step.optimizer is None:
            raise CannotTell("expected an optimizer, got none; give Monitor(model, optimizer)")
        names = {id(p): n for n, p in step.model.named_parameters()}
        found = {}
        for group in step.optimizer.param_groups:
            for p in group["params"]:
                state = step.optimizer.state.get(p, {})
                if p.ndim < 2 or "exp_avg_sq" not in state or not group.get("eps") or id(p) not in names:
                    continue
                taken = float(state.get("step", 0))
                if taken:
                    v = state["exp_avg_sq"].double().mean() / (1 - float(group["betas"][1]) ** taken)
                    found[names[id(p)]] = v.sqrt() / group["eps"]
        living = {n: x for n, x in found.items() if float(x) > 0}
        if not living:
            raise CannotTell(
                "expected an optimizer of Adam's kind that has taken a step, got one without exp_avg_sq and eps"
            )
        worst = min(living, key=lambda n: float(living[n]))
        return {"stability/epsilon_ratio": living[worst], f"stability/epsilon_ratio/{worst}": living[worst]}


def epsilon() -> Epsilon:
    """See `Epsilon`."""
    return Epsilon()


@dataclass(frozen=True)
class TopSingular:
    """Largest singular value of each weight, a filter's channels as rows: parameter/top_singular.

    By power iteration on W^T W from the vector of the last call, at least `iterations` of it. It comes from below: the value is
    |W v| for a unit v, and grows into the largest singular value over a few calls.

    Args:
        iterations: of each call; ten times as many in the first.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad(): _ = model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        >>> step = Step(number=1, loss=torch.zeros(()), model=model)
        >>> round(float(top_singular()(step)["parameter/top_singular/weight"]), 4)
        3.0

    Source: diagnostic of the steady state of weight decay, "Robust layerwise scaling rules by proper weight decay tuning" 2025.
    """

    iterations: int = 2
    name: str = "top_singular"

    def __call__(self, step: Step) -> Readings:
        """The readings of a step."""
        vectors = step.kept.setdefault("top_singular", {})
        found = {}
        for name, p in step.parameters.items():
            if p.ndim < 2 or not p.numel():
                continue
            W = p.flatten(1).to(torch.float64 if p.dtype == torch.float64 else torch.float32)
            v = vectors.get(name)
            count = self.iterations if v is not None else 10 * self.iterations
            if v is None:
                v = torch.randn(W.shape[1], generator=torch.Generator().manual_seed(0)).to(W)
            for _ in range(count):
                v = W.T @ (W @ v)
                v = v / v.norm().clamp(min=torch.finfo(W.dtype).tiny)
            vectors[name] = v
            found[f"parameter/top_singular/{name}"] = (W @ v).norm()
        return found


def top_singular(iterations: int = 2) -> TopSingular:
    """See `TopSingular`."""
    return TopSingular(iterations)
