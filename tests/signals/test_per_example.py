"""Gradients of single examples against a float64 loop of `autograd.grad` over slices of the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.cases import BY_NAME, Tied, padded, per_token
from tests.problems import Branching
from tests.state import fingerprint
from towtank.problem import Problem
from towtank.signals.per_example import ExampleGradients, pass_cost
from towtank.signals.step import CannotTell

PLAIN = ["tanh", "conv2d", "groupnorm", "batchnorm_eval", "layernorm", "tied", "sdpa", "multihead", "lstm"]
EPS = torch.finfo(torch.float64).eps


def double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def by_loop(model: nn.Module, losses: Any, weights: list[float]) -> Tensor:
    """(M, P): weight_i times the gradient of losses(model, i), by plain autograd."""
    rows = []
    for i, weight in enumerate(weights):
        grads = torch.autograd.grad(losses(model, i), list(model.parameters()), allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads))
        rows.append(weight * torch.cat([g.flatten() for g in zeros]))
    return torch.stack(rows)


def close(got: Tensor, wanted: Tensor, eps: float = EPS) -> None:
    """Equal up to the rounding of some thousand operations."""
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 2_000 * eps * float(wanted.abs().max())


def agrees(examples: ExampleGradients, wanted_MP: Tensor) -> None:
    close(torch.cat(list(examples.chunks())), wanted_MP)
    close(examples.squares, wanted_MP.square().sum(1))
    close(examples.mean, wanted_MP.mean(0))
    close(examples.inners, wanted_MP @ wanted_MP.mean(0))
    assert examples.count == len(wanted_MP)
    for name, place in examples.problem.slices.items():
        close(torch.tensor(examples.tensor_squares[name], dtype=torch.float64), wanted_MP[:, place].square().sum())
        close(
            torch.tensor(examples.mean_squares[name], dtype=torch.float64), wanted_MP[:, place].mean(0).square().sum()
        )


@pytest.mark.parametrize("name", PLAIN)
def test_agrees_with_a_loop(name: str) -> None:
    model, loss, (x, y) = BY_NAME[name].make()
    model, x = model.double(), double(x)
    wanted = by_loop(model, lambda m, i: loss(m(x[i : i + 1]), y[i : i + 1]), [1.0] * len(x))
    examples = ExampleGradients(Problem(model, loss, (x, y)), chunk=3)
    agrees(examples, wanted)
    close(examples.mean, Problem(model, loss, (x, y)).gradient()[1])
    assert examples.how.startswith("one by one" if name == "lstm" else "vmap")


def test_padded_tokens_weigh_by_what_counts() -> None:
    model = Tied().double()
    ids, targets = torch.randint(11, (4, 6)), torch.randint(11, (4, 6))
    targets[0, 2:], targets[2] = -100, -100  # 2 terms, and an example without any
    counts = [2, 6, 6]
    kept = [0, 1, 3]
    wanted = by_loop(
        model,
        lambda m, k: per_token(m(ids[kept[k]][None]), targets[kept[k]][None]),
        [3 * c / sum(counts) for c in counts],
    )
    agrees(ExampleGradients(Problem(model, per_token, (ids, targets))), wanted)


def test_targets_flattened_over_tokens_are_cut_by_example() -> None:
    model = Tied().double()
    ids, targets = torch.randint(11, (3, 6)), torch.randint(11, (3, 6))
    loss = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y)  # noqa: E731
    wanted = by_loop(model, lambda m, i: loss(m(ids[i : i + 1]), targets[i]), [1.0] * 3)
    agrees(ExampleGradients(Problem(model, loss, (ids, targets.flatten()))), wanted)


def test_mapping_batch_of_a_hugging_face_model() -> None:
    pytest.importorskip("transformers")
    model, loss, _ = BY_NAME["gpt2"].make()
    model, batch = model.double().eval(), padded()
    labels = batch["labels"][:, 1:]
    counts = [int((row != -100).sum()) for row in labels]

    def one(m: nn.Module, i: int) -> Tensor:
        logits = m(input_ids=batch["input_ids"][i : i + 1], attention_mask=batch["attention_mask"][i : i + 1]).logits
        return F.cross_entropy(logits[0, :-1], labels[i])

    agrees(
        ExampleGradients(Problem(model, loss, batch)),
        by_loop(model, one, [len(counts) * c / sum(counts) for c in counts]),
    )


def test_several_batches_of_unequal_size_count_every_example_alike() -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    wanted = by_loop(model, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1]), [1.0] * 7)
    agrees(ExampleGradients(Problem(model, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])]), chunk=2), wanted)


def test_control_flow_on_numbers_goes_one_by_one() -> None:
    model = Branching().double()
    x, y = torch.randn(4, 20, dtype=torch.float64), torch.randint(5, (4,))
    examples = ExampleGradients(Problem(model, F.cross_entropy, (x, y)))
    agrees(examples, by_loop(model, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1]), [1.0] * 4))
    assert "control flow" in examples.how


def test_inner_products_fall_back_where_there_is_no_forward_derivative() -> None:
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.square()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return 2 * ctx.saved_tensors[0] * grads[0]

    class Model(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Square.apply(super().forward(input))  # type: ignore

    model = Model(3, 2).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    examples = ExampleGradients(Problem(model, F.cross_entropy, (x, y)))
    agrees(examples, by_loop(model, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1]), [1.0] * 5))
    assert examples.how.startswith("vmap")


def test_measuring_leaves_no_trace() -> None:
    model, loss, batch = BY_NAME["batchnorm_eval"].make()
    model.train()
    loss(model(batch[0]), batch[1]).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    examples = ExampleGradients(Problem(model, loss, batch), chunk=2)
    before = fingerprint(model, optimizer)
    assert examples.inners.shape == (4,) and examples.how.startswith(
        "vmap"
    )  # in the mode of the problem, not the model's
    chunks = examples.chunks()
    next(chunks)
    assert fingerprint(model, optimizer) == before  # between chunks too
    assert pass_cost(examples.problem) > 1
    assert fingerprint(model, optimizer) == before


def test_frozen_parameters_are_left_out_and_half_precision_is_widened() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    x, y = torch.randn(4, 3, dtype=torch.bfloat16), torch.randint(2, (4,))
    examples = ExampleGradients(Problem(model, F.cross_entropy, (x, y)))
    wide = copy.deepcopy(model).double()
    head = [1.0] * 4
    wanted = by_loop(wide[1], lambda m, i: F.cross_entropy(m(wide[0](x[i : i + 1].double())), y[i : i + 1]), head)
    close(torch.cat(list(examples.chunks())).double(), wanted, torch.finfo(torch.float32).eps)
    assert list(examples.tensor_squares) == ["1.weight", "1.bias"]


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize(
    ("model", "loss", "options", "words"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), F.cross_entropy, {"mode": "train"}, "normalizes over"),
        (nn.Linear(3, 4), contrastive, {}, "couples examples"),
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout()), F.cross_entropy, {"dropout": True}, "random numbers"),
    ],
)
def test_coupled_examples_are_refused(model: nn.Module, loss: Any, options: Any, words: str) -> None:
    problem = Problem(model, loss, (torch.randn(6, 3), torch.randint(4, (6,))), **options)
    with pytest.raises(CannotTell, match=words):
        _ = ExampleGradients(problem).squares


def test_numbers_that_are_not_finite_and_shapes_that_do_not_tell_are_refused() -> None:
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    x[1, 0] = torch.nan
    with pytest.raises(CannotTell, match="finite"):
        _ = ExampleGradients(Problem(nn.Linear(3, 2), F.cross_entropy, (x, y))).squares
    odd = Problem(nn.Linear(3, 2), lambda outputs, targets: outputs.mean(), (torch.randn(4, 3), torch.randn(3)))
    with pytest.raises(CannotTell, match="leading dimension"):
        _ = ExampleGradients(odd).squares
    with pytest.raises(ValueError, match="at least 1"):
        ExampleGradients(odd, chunk=0)
