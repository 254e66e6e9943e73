"""The workloads of `bench/curvature.py`, and float64 references that share no code with any system measured.

An MLP 784-512-512-10 at batch 256, a GPT of 0.9M parameters (explicit softmax attention, affine LayerNorm) at 16 x 128
tokens, a ResNet-20 (BatchNorm in eval mode) at batch 64. Each is first trained by 30 Adam steps on synthetic, learnable
data, so that its Hessian has the outlier eigenvalues of a trained network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Callable[[], tuple[Tensor, Tensor]]
GPT_WIDTH, GPT_HEADS, GPT_DEPTH, GPT_CONTEXT, VOCABULARY = 128, 4, 4, 128, 256


@dataclass(frozen=True)
class Case:
    """A trained model, the mean loss of its outputs, and the one batch everything is measured on."""

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of outputs (..., C) and targets (...)."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of `named_parameters`, which is that of all flat vectors here."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters)

    def gradient(self) -> Tensor:
        """Forward and backward on the batch: the unit of cost."""
        loss = self.loss(self.model(self.inputs), self.targets)
        return flat(torch.autograd.grad(loss, self.parameters))

    def to(self, device: str) -> Case:
        """The same case elsewhere."""
        model = copy.deepcopy(self.model).to(device)
        return Case(self.name, model, self.inputs.to(device), self.targets.to(device))


class Block(nn.Module):
    """Pre-norm transformer block with explicit causal softmax attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(GPT_WIDTH), nn.LayerNorm(GPT_WIDTH)
        self.qkv, self.out = nn.Linear(GPT_WIDTH, 3 * GPT_WIDTH), nn.Linear(GPT_WIDTH, GPT_WIDTH)
        self.up, self.down = nn.Linear(GPT_WIDTH, 4 * GPT_WIDTH), nn.Linear(4 * GPT_WIDTH, GPT_WIDTH)
        self.register_buffer("mask", torch.full((GPT_CONTEXT, GPT_CONTEXT), -torch.inf).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added to x (B, T, D)."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, GPT_HEADS, D // GPT_HEADS).permute(2, 0, 3, 1, 4).unbind()
        weights = (q @ k.transpose(-1, -2) / math.sqrt(D // GPT_HEADS) + self.mask[:T, :T]).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """875,264 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, GPT_WIDTH)
        self.positions = nn.Embedding(GPT_CONTEXT, GPT_WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(GPT_DEPTH)))
        self.norm = nn.LayerNorm(GPT_WIDTH)
        self.head = nn.Linear(GPT_WIDTH, VOCABULARY, bias=False)
        for p in (self.tokens.weight, self.positions.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        same = inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of x (B, C, H, W)."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet20() -> nn.Module:
    """272,282 parameters (He et al. 2016, section 4.2, with 1x1 convolutions where the shape changes)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for outside in (16, 32, 64):
        for index in range(3):
            layers.append(Residual(inside, outside, 2 if index == 0 and outside > 16 else 1))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def build(name: str) -> Case:
    """A case trained for 30 steps on fresh batches, then measured on one more; the same in every process up to rounding.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _MAKERS:
        raise ValueError(f"expected a workload among {', '.join(_MAKERS)}; got {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = _MAKERS[name]()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(30):
            case = Case(name, model, *batch())
            optimizer.zero_grad()
            case.loss(model(case.inputs), case.targets).backward()
            optimizer.step()
        optimizer.zero_grad()
        return Case(name, model.eval(), *batch())


def _mlp() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    centres = 0.1 * torch.randn(10, 784)

    def batch() -> tuple[Tensor, Tensor]:
        targets = torch.randint(10, (256,))
        return centres[targets] + torch.randn(256, 784), targets

    return model, batch


def _gpt() -> tuple[nn.Module, Batches]:
    follows = torch.randperm(VOCABULARY)

    def batch() -> tuple[Tensor, Tensor]:
        chain = [torch.randint(VOCABULARY, (16,))]
        for _ in range(GPT_CONTEXT):
            noise = torch.randint(VOCABULARY, (16,))
            chain.append(torch.where(torch.rand(16) < 0.9, follows[chain[-1]], noise))
        text = torch.stack(chain, 1)
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()

    return GPT(), batch


def _cnn() -> tuple[nn.Module, Batches]:
    centres = torch.randn(10, 3, 32, 32)

    def batch() -> tuple[Tensor, Tensor]:
        targets = torch.randint(10, (64,))
        return centres[targets] + torch.randn(64, 3, 32, 32), targets

    return resnet20(), batch


_MAKERS = {"mlp": _mlp, "gpt": _gpt, "cnn": _cnn}


def flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


class Reference:
    """Products and eigenvalue in float64: double backward for H, explicit J^T S J for G."""

    def __init__(self, case: Case) -> None:
        self.case = Case(case.name, copy.deepcopy(case.model).double(), _double(case.inputs), case.targets)
        self.parameters = self.case.parameters
        self.outputs = self.case.model(self.case.inputs)
        self.logits = self.outputs.flatten(0, -2)
        loss = self.case.loss(self.outputs, self.case.targets)
        self.gradient = flat(torch.autograd.grad(loss, self.parameters, create_graph=True))

    def hessian(self, v: Tensor) -> Tensor:
        """H v."""
        return flat(torch.autograd.grad(self.gradient, self.parameters, v.double(), retain_graph=True))

    def gauss_newton(self, v: Tensor) -> Tensor:
        """J^T S J v, with S = (diag(p) - p p^T) / n of the softmax cross-entropy."""
        u = torch.zeros_like(self.logits, requires_grad=True)
        back = flat(torch.autograd.grad(self.logits, self.parameters, u, create_graph=True))
        (Jv,) = torch.autograd.grad(back, u, v.double())
        p = self.logits.detach().softmax(-1)
        SJv = (p * Jv - p * (p * Jv).sum(-1, keepdim=True)) / p.shape[0]
        return flat(torch.autograd.grad(self.logits, self.parameters, SJv, retain_graph=True))

    def largest(self) -> float:
        """The largest eigenvalue of H, to about 1e-6, by ARPACK."""
        shape = (self.case.size, self.case.size)
        product = lambda v: self.hessian(torch.from_numpy(np.ravel(v))).numpy()  # noqa: E731
        start = torch.randn(self.case.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        A = LinearOperator(shape, matvec=product, dtype=np.float64)
        return float(eigsh(A, k=1, which="LA", tol=1e-6, v0=start.numpy(), return_eigenvectors=False)[0])

    def traces(self, labels: int, probes: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """((tr G, standard error), (tr H, standard error)): random signs on a square root of S for tr G; on all of v for tr H - tr G."""
        generator = torch.Generator().manual_seed(2)
        p, n = self.logits.detach().softmax(-1), self.logits.shape[0]
        g = torch.empty(labels, dtype=torch.float64)
        for k in range(labels):
            signs = torch.randint(2, p.shape, generator=generator).to(p.device) * 2 - 1
            u = p.sqrt() * signs  # (D^1/2 - p sqrt(p)^T) signs: its second moment is D - p p^T
            u = (u - p * u.sum(-1, keepdim=True)) / n**0.5
            back = torch.autograd.grad(self.logits, self.parameters, u, retain_graph=True)
            g[k] = flat(back).square().sum()
        d = torch.empty(probes, dtype=torch.float64)
        for k in range(probes):
            v = (torch.randint(2, (self.case.size,), generator=generator) * 2.0 - 1).to(p.device)
            d[k] = v.double() @ (self.hessian(v) - self.gauss_newton(v))
        g_se, d_se = (float(x.std() / len(x) ** 0.5) for x in (g, d))
        return (float(g.mean()), g_se), (float(g.mean() + d.mean()), math.hypot(g_se, d_se))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
