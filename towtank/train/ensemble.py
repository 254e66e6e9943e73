"""Members that differ only in numbers, trained as one batched program.

Parameters are stacked along a leading member axis E; the loss of one member is written once and batched by `vmap`, so a
linear layer of E members is one batched matrix product. Each member has its own learning rate, decay, betas, clipping and
divergence flag, and comes out as if it had been trained alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

from towtank.losses import z_loss
from towtank.optim import rule_of
from towtank.optim.clip import clip_scale, member_norms
from towtank.optim.engine import Surround
from towtank.optim.members import Members
from towtank.optim.rule import Rule
from towtank.scaling.plan import Plan, Role
from towtank.train import samples
from towtank.train.settings import Member
from towtank.train.task import Batch, Task


@dataclass(frozen=True)
class StepOutput:
    """Losses (E,), gradient norms before clipping (E,), which members moved (E,), and signals of shape (E,) if asked for."""

    loss: Tensor
    grad_norm: Tensor
    moved: Tensor
    signals: dict[str, Tensor]


class Ensemble:
    """E members of one task with their own numbers.

    Args:
        tasks: one task per member; models of one structure, already initialized.
        members: the numbers of each.
        plan: multipliers by parameter name.
        roles: role by parameter name; the signals are grouped by it.
        optimizer: public name of a rule of `towtank.optim`.
        decay: `independent` or `coupled`.
        device: where to train.
        dtype: floating-point type of parameters and arithmetic.

    Raises:
        ValueError: if there are no members, or not one task for each, or the rule samples labels and there are no logits.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        members: Sequence[Member],
        *,
        plan: Plan,
        roles: dict[str, Role],
        optimizer: str = "AdamW",
        decay: str = "independent",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not members or len(tasks) != len(members):
            raise ValueError(f"expected one task per member and at least one, got {len(tasks)} and {len(members)}")
        self.task, self.members, self.plan, self.roles, self.decay = tasks[0], list(members), plan, roles, decay
        self.device = torch.device(device)
        self._model = tasks[0].model
        self.params, self._buffers, self._buffer_dims = _stack([t.model for t in tasks], self.device, dtype)
        for name, p in (self.params | self._buffers).items():
            if name in plan:  # frozen parameters are among the buffers
                p.mul_(plan[name].init)
        self._numbers = _member_columns(members, self.device)
        self.rule = rule_of(optimizer)
        if self.rule.curvature == "squared" and not self.task.outputs_are_logits:
            raise ValueError(
                f"optimizer = {optimizer!r}: expected a task whose outputs are logits, to sample labels from"
            )
        self._optimizer = Members(self.rule, self.params, roles, _hyper(self.rule, self._numbers))
        self._z_loss = self._numbers["z_loss"].to(dtype)
        self.alive = torch.ones(len(members), dtype=torch.bool, device=self.device)
        self._loss_takes_log_z = "log_z" in inspect.signature(self.task.loss).parameters
        self._probes = "probe" in inspect.signature(self._model.forward).parameters
        self._batched = {probing: self._vmapped(probing) for probing in (False, True)}

    def __len__(self) -> int:
        return len(self.members)

    def compile(self) -> None:
        """Compile the batched loss (the gradient with it); the probing pass, which is rare, stays eager."""
        self._batched[False] = torch.compile(self._batched[False])

    def step(self, batch: Batch, scale: float, *, probing: bool = False) -> StepOutput:
        """One update of every living member.

        Args:
            batch: inputs and targets with a leading member axis, (E, B, ...).
            scale: the schedule's share of the peak learning rate.
            probing: also return the signals.
        """
        if self.rule.observe is not None and self._optimizer.updates % samples.EVERY.get(self.rule.name, 1) == 0:
            self._observe(batch)
        losses, grads, signals = self._gradients(batch, probing)
        norms = member_norms(list(grads.values()))
        moved = self.alive & losses.isfinite() & norms.isfinite()
        clip = clip_scale(norms, self._numbers["clip"].to(norms.dtype))
        if probing:
            signals |= self._sizes(grads, clip)
        self._optimizer.advance(grads, lambda name, hyper: self._rates(name, hyper, scale, clip), moved)
        return StepOutput(losses, norms, moved, signals)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], members: Sequence[int] | None = None) -> Tensor:
        """Mean loss of members (all of them, or those of the given indices) over batches of shape (B, ...) they share."""
        self._model.eval()

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            state = (self._effective(params), self._effective(buffers))
            return self.task.loss(functional_call(self._model, state, (inputs,)), targets)

        chosen = slice(None) if members is None else list(members)
        params = {name: p[chosen] for name, p in self.params.items()}
        buffers = {name: b if self._buffer_dims[name] is None else b[chosen] for name, b in self._buffers.items()}
        count = len(self) if members is None else len(members)
        batched = torch.vmap(loss, in_dims=(0, self._buffer_dims, 0, 0)) if count > 1 else self._alone(loss)
        total = torch.zeros(count, device=self.device)
        for batch in batches:
            inputs, targets = (self._to(x).expand(count, *x.shape) for x in batch)
            total = total + batched(params, buffers, inputs, targets)
        return total / len(batches)

    def freeze(self, dead: Tensor) -> None:
        """Stop the members where `dead` (E,) is true: they keep their last parameters and no longer move."""
        self.alive = self.alive & ~dead

    def _to(self, x: Tensor) -> Tensor:
        return x.to(self.device, self._dtype if x.is_floating_point() else None)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype

    def _effective(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters (frozen ones are among the buffers) times their forward multipliers."""
        forward = {name: self.plan[name].forward if name in self.plan else 1 for name in tensors}
        return {name: t if forward[name] == 1 else t * forward[name] for name, t in tensors.items()}

    def _vmapped(self, probing: bool):  # noqa: ANN202 - a function of tensors
        penalized = bool((self._numbers["z_loss"] > 0).any())

        def member(params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor, z: Tensor):
            probe: dict[str, Tensor] = {}
            keywords = {"probe": probe} if probing and self._probes else {}
            state = (self._effective(params), self._effective(buffers))
            outputs = functional_call(self._model, state, (inputs,), keywords)
            log_z = outputs.logsumexp(-1) if penalized or (probing and self.task.outputs_are_logits) else None
            known = {"log_z": log_z} if self._loss_takes_log_z else {}
            loss = self.task.loss(outputs, targets, **known)
            total = loss + z * z_loss(log_z) if penalized and log_z is not None else loss
            if probing and log_z is not None:
                probe |= {"log_z/mean": log_z.detach().mean(), "log_z/min": log_z.detach().amin()}
            return total, loss.detach(), probe

        if len(self) == 1:  # nothing to batch: a model that vmap cannot take still trains, alone
            return self._alone(member)
        return torch.vmap(member, in_dims=(0, self._buffer_dims, 0, 0, 0), randomness="different")

    def _alone(self, member):  # noqa: ANN001, ANN202
        """The function of one member, called as the batched one is, with a member axis of length 1."""

        def first(params: dict[str, Tensor], buffers: dict[str, Tensor], *rest: Tensor):
            own = {name: b if self._buffer_dims[name] is None else b[0] for name, b in buffers.items()}
            result = member({name: p[0] for name, p in params.items()}, own, *(x[0] for x in rest))
            return tree_map(lambda x: x.unsqueeze(0), result)

        return first

    def _gradients(self, batch: Batch, probing: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        self._model.train()
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        inputs, targets = (self._to(x) for x in batch)
        total, losses, signals = self._batched[probing](leaves, self._buffers, inputs, targets, self._z_loss)
        grads = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return losses, dict(zip(leaves, grads, strict=True)), signals

    def _observe(self, batch: Batch) -> None:
        """Hand a sample of the curvature at this batch to the rule."""
        self._model.train()
        inputs, targets = (self._to(x) for x in batch)
        seeds, count, penalty = [m.seed for m in self.members], self._optimizer.observed, torch.zeros_like(self._z_loss)
        eager = self._vmapped(False)  # a compiled one has no second derivative
        if self.rule.curvature == "signed":
            found = samples.signed(
                lambda p: eager(p, self._buffers, inputs, targets, penalty)[0], self.params, seeds, count
            )
        else:
            with torch.no_grad():
                drawn = samples.labels(self._outputs(inputs), seeds, count)
            leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            total = eager(leaves, self._buffers, inputs, drawn.to(targets.dtype), penalty)[0].sum()
            grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
            found = {name: g.square() for name, g in zip(leaves, grads, strict=True)}
            self._count_terms(drawn[0].numel())
        self._optimizer.observe(found, self.alive)

    def _count_terms(self, terms: int) -> None:
        """Tell the rule how many loss terms the mean of a batch is over."""
        hyper = self._optimizer.hyper
        self._optimizer.hyper = hyper._replace(bs=torch.full_like(hyper.lr, float(terms)))

    def _outputs(self, inputs: Tensor) -> Tensor:
        """The outputs of all members, (E, ...)."""

        def outputs(params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return functional_call(self._model, (self._effective(params), self._effective(buffers)), (inputs,))

        if len(self) == 1:
            return self._alone(outputs)(self.params, self._buffers, inputs)
        return torch.vmap(outputs, in_dims=(0, self._buffer_dims, 0), randomness="different")(
            self.params, self._buffers, inputs
        )

    def _rates(self, name: str, hyper: Any, scale: float, clip: Tensor) -> tuple[Any, Surround]:
        """This step's learning rate of a tensor, its decay and clipping."""
        factors, decay = self.plan[name], self._numbers["weight_decay"]
        peak = hyper.lr * factors.lr
        if self.rule.decays:  # its decay is lr lambda
            own = decay * factors.weight_decay / (peak if self.decay == "independent" else 1.0)
            return hyper._replace(lr=scale * peak, weight_decay=own), Surround(scale=clip)
        shrink = scale * (1.0 if self.decay == "independent" else peak) * decay * factors.weight_decay
        return hyper._replace(lr=scale * peak), Surround(shrink=shrink, scale=clip)

    @property
    def state_bytes(self) -> float:
        """Bytes of the optimizer's state per parameter."""
        held = sum(s.numel() * s.element_size() for state in self._optimizer.state.values() for s in state)
        return held / sum(p.numel() for p in self.params.values())

    @torch.no_grad()
    def _sizes(self, grads: dict[str, Tensor], clip: Tensor) -> dict[str, Tensor]:
        """Root mean squares by role: of the step at learning rate 1, and of the parameters before it."""
        directions = self._optimizer.directions(grads, clip)
        return {
            f"{what}_rms/{role}": _rms([tensors[n].flatten(1) for n in tensors if self.roles[n] == role])
            for role in dict.fromkeys(self.roles[n] for n in self.params)
            for what, tensors in (("update", directions), ("parameter", self.params))
        }


def _rms(tensors: list[Tensor]) -> Tensor:
    squares = torch.stack([t.square().sum(1) for t in tensors]).sum(0)
    return (squares / sum(t.shape[1] for t in tensors)).sqrt()


def _stack(models: Sequence[nn.Module], device: torch.device, dtype: torch.dtype):  # noqa: ANN202
    """Stacked parameters, buffers, and for each buffer whether it has a member axis (equal constants are shared).

    Raises:
        ValueError: if no parameter requires a gradient.
    """
    params, stacked = stack_module_state(list(models))
    trained = {name for name, p in models[0].named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("expected a model with at least one parameter that requires a gradient, got none")
    stacked |= {name: p.detach() for name, p in params.items() if name not in trained}
    params = {name: p.detach().to(device, dtype, copy=True) for name, p in params.items() if name in trained}
    running = {  # buffers that a forward pass writes must be each member's own
        f"{name}.{b}".removeprefix(".")
        for name, module in models[0].named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for b, _ in module.named_buffers(recurse=False)
    }
    buffers: dict[str, Tensor] = {}
    dims: dict[str, int | None] = {}
    for name, b in stacked.items():
        shared = name not in running and torch.equal(b, b[:1].expand_as(b))
        b = b[0] if shared else b
        buffers[name] = b.to(device, dtype if b.is_floating_point() else None, copy=True)
        dims[name] = None if shared else 0
    return params, buffers, dims


def _hyper(rule: Rule, numbers: dict[str, Tensor]) -> Any:
    """The rule's numbers by member: those of the members, and the rule's defaults for what is its own."""
    defaults = rule.hyper()._asdict()
    like = numbers["lr"]
    return rule.hyper(**{n: numbers[n] if n in numbers else torch.full_like(like, v) for n, v in defaults.items()})


def _member_columns(members: Sequence[Member], device: torch.device) -> dict[str, Tensor]:
    names = ("lr", "weight_decay", "beta1", "beta2", "eps", "z_loss", "clip")
    return {n: torch.tensor([getattr(m, n) for m in members], device=device, dtype=torch.float64) for n in names}
