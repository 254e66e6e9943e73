"""K-FAC and EK-FAC against dense Gauss-Newton matrices that this file writes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.state import fingerprint
from towtank.curvature.kfac import EKFAC, KFAC
from towtank.problem import Problem

F64 = torch.float64
# Rounding of a sum of a few hundred float64 products: 2^-52 times their number, with a margin for the eigenvectors.
ROUNDING = 1e-10


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def dense(model: nn.Module, loss, x: Tensor, y: Tensor) -> Tensor:
    """J^T (d^2 loss / d outputs^2) J in the order of `model.parameters()`, from Jacobians alone."""
    names = [n for n, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def outputs(*params: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,))

    J = torch.cat([j.flatten(outputs(*values).ndim).flatten(0, -2) for j in _jacobians(outputs, values)], dim=1)
    z = outputs(*values).detach()
    H = torch.autograd.functional.hessian(lambda o: loss(o.view_as(z), y), z.reshape(-1))
    return J.T @ H @ J


def _jacobians(outputs, values):
    found = torch.autograd.functional.jacobian(outputs, values)
    return [j.reshape(*outputs(*values).shape, -1) for j in found]


def blocks(model: nn.Module, G: Tensor, *together: tuple[str, ...]) -> Tensor:
    """G with zeros between parameters that are not named together."""
    slices, start = {}, 0
    for name, p in model.named_parameters():
        slices[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    kept = torch.zeros_like(G)
    groups = [*together, *((n,) for n in slices if not any(n in t for t in together))]
    for group in groups:
        index = torch.cat([slices[n] for n in group])
        kept[index[:, None], index] = G[index[:, None], index]
    return kept


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=tuple(range(1, x.ndim - 1)))


class PixelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1, 2)


def exact_cases() -> dict[str, tuple]:
    """Model, sharing, loss, inputs, targets where K-FAC is exact (Bernacchia et al. 2018; Eschenhagen et al. 2023, 3.1, 3.2).

    In linear networks under squared error with independent outputs rho does not depend on the example.
    """
    torch.manual_seed(0)
    x, tokens, image = normal(7, 3), normal(5, 4, 3), normal(4, 2, 5, 5)
    deep = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).double()
    pooled = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), Mean()).double()
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1), PixelsLast()).double()
    circular = nn.Sequential(nn.Conv2d(2, 3, (3, 2), padding=1, padding_mode="circular"), PixelsLast()).double()
    words = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 2)).double()
    ids = torch.tensor([0, 3, 3, 5, 1])
    one = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return {
        "one example": (one, "expand", cross_entropy, x[:1], torch.tensor([1])),
        "single layer": (deep[:1], "expand", mse, x, normal(7, 4)),
        "deep linear": (deep, "expand", mse, x, normal(7, 2)),
        "expand": (deep, "expand", mse, tokens, normal(5, 4, 2)),
        "reduce": (pooled, "reduce", mse, tokens, normal(5, 2)),
        "convolution": (conv, "expand", mse, image, normal(4, 9, 3)),
        "circular padding": (circular, "expand", mse, image, normal(4, 30, 3)),
        "embedding": (words, "expand", mse, ids, normal(5, 2)),
    }


@pytest.mark.parametrize("case", exact_cases())
def test_it_is_the_gauss_newton_block_where_it_is_exact(case: str) -> None:
    model, sharing, loss, x, y = exact_cases()[case]
    layers = [tuple(f"{n}.{k}" for k, _ in m.named_parameters()) for n, m in model.named_children()]
    wanted = blocks(model, dense(model, loss, x, y), *(names for names in layers if names))
    problem = Problem(model, loss, (x, y))
    assert relative(KFAC(problem, sharing=sharing).dense(), wanted) < ROUNDING
    assert relative(EKFAC(problem, sharing=sharing).dense(), wanted) < ROUNDING


def network() -> tuple[nn.Module, tuple[Tensor, Tensor], list[tuple[str, ...]]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, (normal(9, 4), torch.arange(9) % 3), [("0.weight", "0.bias"), ("2.weight", "2.bias")]


def test_ekfac_has_the_exact_second_moments_of_gradients_in_its_basis_and_is_closer() -> None:
    model, (x, y), layers = network()
    G = dense(model, cross_entropy, x, y)
    problem = Problem(model, cross_entropy, (x, y))
    near, nearer = KFAC(problem), EKFAC(problem)
    for block in nearer.blocks:
        one = torch.kron(block.left, block.right)
        part = blocks(model, G, *layers)
        inside = nearer._coordinates(list(block.names))
        m, n = block.spectrum.shape
        order = inside[
            torch.cat([torch.arange(m * (n - 1)).view(m, n - 1), torch.arange(m * (n - 1), m * n)[:, None]], 1)
        ]
        part = part[order.flatten()][:, order.flatten()]
        assert torch.allclose((one.T @ part @ one).diagonal(), block.spectrum.flatten(), rtol=0, atol=ROUNDING)
    wanted = blocks(model, G, *layers)
    assert relative(nearer.dense(), wanted) < 0.99 * relative(near.dense(), wanted) < 0.99  # it is not trivially exact
    assert abs(nearer.trace() / float(G.trace()) - 1) < ROUNDING


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_inverse_trace_determinant_and_diagonal_are_those_of_the_dense_matrix(kind: type) -> None:
    model, data, layers = network()
    op = kind(Problem(model, cross_entropy, data))
    A, eye = op.dense(), torch.eye(op.shape[0], dtype=F64)
    assert relative(op.inverse(0.1).dense(), torch.linalg.inv(A + 0.1 * eye)) < ROUNDING
    assert abs(op.trace() - float(A.trace())) < ROUNDING
    assert abs(op.logdet(0.1) - float(torch.logdet(A + 0.1 * eye))) < ROUNDING * op.shape[0]
    assert torch.allclose(op.diagonal(), A.diagonal(), rtol=0, atol=ROUNDING)
    block = op.restrict(layers[1])
    assert relative(block.dense(), A[-18:, -18:]) < ROUNDING
    assert relative(op.restrict(["0.weight"]).dense(), A[:20, :20]) < ROUNDING
    with pytest.raises(ValueError, match="raise it"):
        op.inverse(0.0)


class Tied(nn.Module):
    """Embedding and head share a weight; nothing lies between, so that one use at a time is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Once(nn.Module):
    """The same function with one of the two uses detached."""

    def __init__(self, tied: Tied, use: str) -> None:
        super().__init__()
        self.embedding, self.head, self.use = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False), use
        self.embedding.weight = nn.Parameter(tied.embedding.weight.detach(), requires_grad=use == "embedding")
        self.head.weight = nn.Parameter(tied.embedding.weight.detach(), requires_grad=use == "head")

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_a_tied_weight_has_both_contributions() -> None:
    torch.manual_seed(2)
    tied = Tied().double()
    data = torch.tensor([0, 3, 3, 5]), normal(4, 6)
    both = KFAC(Problem(tied, mse, data))
    parts = [KFAC(Problem(Once(tied, use), mse, data)) for use in ("embedding", "head")]
    assert abs(both.trace() - sum(p.trace() for p in parts)) < ROUNDING
    alone = sum(p.dense() for p in parts)
    block = both.blocks[0]
    left = torch.eye(6, dtype=F64) if block.left is None else block.left
    Q = torch.kron(left, block.right)
    assert torch.allclose((Q.T @ alone @ Q).diagonal(), block.spectrum.flatten(), rtol=0, atol=ROUNDING)
    G = dense(tied, mse, *data)  # with the cross terms of the two uses
    assert abs(EKFAC(Problem(tied, mse, data)).trace() / float(G.trace()) - 1) < ROUNDING


class Calls(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu_())


def test_calls_of_one_layer_are_positions_and_in_place_changes_behind_it_do_no_harm() -> None:
    torch.manual_seed(3)
    model, x = Calls().double(), normal(8, 3)
    G = dense(model, mse, x, torch.zeros(8, 3, dtype=F64))
    op = EKFAC(Problem(model, mse, (x, torch.zeros(8, 3, dtype=F64))))
    assert abs(op.trace() / float(G.trace()) - 1) < ROUNDING


class Padded(nn.Module):
    """Tokens, some of them padding, to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.embedding(ids))))


def padded_batches() -> tuple[list, list]:
    ids, labels = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2], [3, 3, 6, 1]]), torch.tensor([[0, 1, 2, 3]] * 3)
    wide = F.pad(ids, (0, 2)), F.pad(labels, (0, 2), value=-100)
    return [(ids, labels)], [(wide[0][:1], wide[1][:1]), (wide[0][1:], wide[1][1:])]


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_and_the_cut_into_batches_change_nothing(kind: type, sharing: str) -> None:
    torch.manual_seed(4)
    model = Padded().double()
    whole, ragged = (kind(Problem(model, cross_entropy, d), sharing=sharing, rest="diagonal") for d in padded_batches())
    assert abs(ragged.trace() / whole.trace() - 1) < ROUNDING
    if (kind, sharing) != (EKFAC, "reduce"):  # three means leave null spaces, in which the eigenvectors are arbitrary
        assert relative(ragged.dense(), whole.dense()) < ROUNDING


def test_normalization_layers_are_exact_diagonals() -> None:
    torch.manual_seed(5)
    model = Padded().double()
    (x, y) = padded_batches()[0][0]
    wanted = dense(model, cross_entropy, x, y).diagonal()
    op = KFAC(Problem(model, cross_entropy, (x, y)), rest="diagonal")
    for name in ("norm.weight", "norm.bias"):
        assert torch.allclose(op.diagonal()[op.slices[name]], wanted[op.slices[name]], rtol=ROUNDING, atol=0)
    image = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.GroupNorm(1, 3), PixelsLast()
    )
    image = image.double().eval()
    data = normal(3, 2, 4, 4), normal(3, 4, 3)
    G, names = dense(image, mse, *data), [n for n, _ in image.named_parameters()]
    op = EKFAC(Problem(image, mse, data), rest="diagonal")
    for name in names[2:]:
        s = op.slices[name]
        assert torch.allclose(op.diagonal()[s], G.diagonal()[s], rtol=ROUNDING, atol=ROUNDING)


def test_sampled_factors_have_the_mean_of_the_exact_ones_and_repeat_with_the_seed() -> None:
    model, data, _ = network()
    problem, count = Problem(model, cross_entropy, data), 60
    exact = KFAC(problem).trace()
    drawn = torch.tensor([KFAC(problem, kind="sampled", generator=s).trace() for s in range(count)])
    # tr(A (x) B) is linear in the drawn factor, so unbiased; 4.9 standard errors: a chance of 1e-6.
    assert abs(float(drawn.mean()) - exact) < 4.9 * float(drawn.std()) / count**0.5
    assert KFAC(problem, kind="sampled", generator=7).trace() == KFAC(problem, kind="sampled", generator=7).trace()
    many = KFAC(problem, kind="sampled", samples=50, generator=1).trace()
    assert abs(many - exact) < 4.9 * float(drawn.std()) / 50**0.5


@pytest.mark.parametrize("loss", [cross_entropy, mse])
def test_empirical_is_made_of_the_gradients_of_examples(loss) -> None:
    model, (x, y), _ = network()
    y = y if loss is cross_entropy else normal(9, 3, seed=1)
    grads = []
    for i in range(len(x)):
        one = loss(model(x[i : i + 1]), y[i : i + 1])
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()))]))
    wanted = torch.stack(grads).square().sum() / len(x)
    assert abs(EKFAC(Problem(model, loss, (x, y)), kind="empirical").trace() / float(wanted) - 1) < ROUNDING


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def test_what_it_cannot_treat_is_named() -> None:
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    with pytest.raises(NotImplementedError, match="attention.in_proj_weight"):
        KFAC(Problem(Attention(), mse, (x, y)))
    out = Problem(Attention(), mse, (x, y), params="attention.out_proj.*")
    with pytest.raises(NotImplementedError, match="out_proj.weight"):  # used, but never called
        KFAC(out)
    with pytest.raises(NotImplementedError, match="the gradient of weight"):
        KFAC(Problem(Scaled(4, 4), mse, (x, y)))
    with pytest.raises(NotImplementedError, match="gain"):
        KFAC(Problem(Bare(), mse, (x[..., :3], y[..., :3])), rest="diagonal")
    with pytest.raises(NotImplementedError, match='1.weight, 1.bias.*rest="diagonal"'):
        KFAC(Problem(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), mse, (x, y)))
    grouped = nn.Conv2d(4, 4, 1, groups=2)
    with pytest.raises(NotImplementedError, match="groups=1"):
        KFAC(Problem(grouped, mse, (x[..., None], x[..., None])))


def test_it_refuses_what_has_no_blocks_or_no_root() -> None:
    x = torch.randn(6, 3)
    wide = Problem(nn.Linear(3, 300), mse, (x, torch.randn(6, 300)))
    with pytest.raises(ValueError, match='kind="sampled"'):
        KFAC(wide)
    assert KFAC(wide, kind="sampled").trace() > 0
    coupled = Problem(nn.Linear(3, 2), lambda z, y: (z.mean(0) - y).square().sum(), (x, torch.zeros(6, 2)))
    with pytest.raises(ValueError, match="couples"):
        KFAC(coupled)
    concave = Problem(nn.Linear(3, 2), lambda z, y: -((z - y) ** 4).mean(), (x, torch.zeros(6, 2)))
    with pytest.raises(ValueError, match="convex"):
        KFAC(concave)
    for bad in ({"kind": "true"}, {"sharing": "all"}, {"samples": 0}):
        with pytest.raises(ValueError, match="expected"):
            KFAC(Problem(nn.Linear(3, 2), mse, (x, torch.zeros(6, 2))), **bad)


def test_nothing_of_the_model_is_changed() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[0].register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    EKFAC(Problem(model, mse, (x, torch.zeros(5, 2))), rest="diagonal", kind="sampled")
    assert fingerprint(model) == before
