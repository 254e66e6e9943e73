"""Problems: the full loss however it is batched, and what varies."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.curvature.cases import BY_NAME, gpt2, padded, per_token
from tests.state import fingerprint
from towtank.problem import Problem


def drawn(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=g), torch.randint(3, (12,), generator=g)


def network(*middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), *middle, nn.Linear(4, 3))


def flat_gradient(loss, parameters) -> torch.Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(parameters))])


def close(a, b) -> bool:
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double().detach(), rtol=1e-5, atol=1e-7)


# Batches and weights (pitfall 5)


def test_ragged_padded_and_reordered_batches_are_the_whole():
    x, y = drawn()
    y[:5] = -100  # the first batches count for less
    model = network(nn.Tanh())
    whole = F.cross_entropy(model(x), y)
    want = flat_gradient(whole, model.parameters())
    for cuts in ([12], [4, 4, 4], [1, 7, 4], [5, 7]):
        parts = list(zip(x.split(cuts), y.split(cuts)))
        for data in (parts, parts[::-1]):
            loss, gradient = Problem(model, F.cross_entropy, data).gradient()
            assert close(loss, whole) and close(gradient, want)


def test_padding_tokens_count_for_nothing():
    case = BY_NAME["gpt2"]
    model, loss, batch = case.make()
    want = Problem(model, loss, batch).gradient()
    rows = [{k: v[i : i + 1, :] for k, v in batch.items()} for i in range(3)]
    rows[0] = {k: v[:, :3] for k, v in rows[0].items()}  # without its padding: batches of unlike lengths
    loss_of, gradient = Problem(model, loss, rows).gradient()
    assert close(loss_of, want[0]) and close(gradient, want[1])


def test_class_weights_and_partial_losses_are_counted():
    x, y = drawn()
    model, weights = network(nn.Tanh()), torch.tensor([0.2, 1.0, 3.0])
    data = list(zip(x.split(5), y.split(5)))
    for loss in (nn.CrossEntropyLoss(weight=weights), functools.partial(F.cross_entropy, ignore_index=2)):
        assert close(Problem(model, loss, data).value(), loss(model(x), y))


def test_elements_count_for_regression():
    x, _ = drawn()
    y = torch.randn(12, 3)
    model = network()
    assert close(Problem(model, F.mse_loss, list(zip(x.split(5), y.split(5)))).value(), F.mse_loss(model(x), y))


def test_wrong_weights_are_found_by_merging_two_batches():
    x, y = drawn()
    y[:4] = -100
    data = list(zip(x.split(5), y.split(5)))
    with pytest.raises(ValueError, match="weight="):
        Problem(network(), F.cross_entropy, data, weight=lambda b: len(b[0])).value()
    with pytest.raises(ValueError, match="weight="):
        Problem(network(), lambda o, t: F.cross_entropy(o, t, reduction="sum"), data).value()
    with pytest.raises(ValueError, match="finite weight"):
        Problem(network(), F.cross_entropy, data, weight=lambda b: -1.0).value()
    Problem(network(), F.cross_entropy, data, weight=lambda b: len(b[0]), checks=False).value()  # asked for


def test_batches_in_which_nothing_counts_are_left_out():
    x, y = drawn()
    data = [(x, torch.full_like(y, -100)), (x, y)]
    model = network()
    assert close(Problem(model, F.cross_entropy, data).value(), F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="ignored"):
        Problem(model, F.cross_entropy, data[:1]).value()


# Forms of batches


def test_hugging_face_loss():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = gpt2().eval(), padded()
    problem = Problem(model, F.cross_entropy, batch)
    assert close(problem.value(), model(**batch).loss)
    assert "labels shifted by one" in problem.convention
    assert problem.survey.total == int((batch["labels"][:, 1:] != -100).sum())


def test_the_decoder_of_hugging_face_gets_its_inputs_from_the_labels():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = T5ForConditionalGeneration(T5Config(**sizes)).eval(), padded()
    problem = Problem(model, F.cross_entropy, batch)
    assert close(problem.value(), model(**batch).loss)
    assert problem.survey.total == int((batch["labels"] != -100).sum())


def test_several_inputs_and_own_forward():
    x, y = drawn()
    bilinear = nn.Bilinear(5, 5, 3)
    want = F.cross_entropy(bilinear(x, x.flip(0)), y)
    for batch in ((x, x.flip(0), y), ((x, x.flip(0)), y), ({"input1": x, "input2": x.flip(0)}, y)):
        assert close(Problem(bilinear, F.cross_entropy, batch).value(), want)
    swapped = Problem(bilinear, F.cross_entropy, {"a": x, "labels": y}, forward=lambda m, b: m(b["a"], b["a"].flip(0)))
    assert close(swapped.value(), want)
    arrays = (x.numpy(), np.asarray(y))
    assert close(
        Problem(network(), F.cross_entropy, arrays).value(), Problem(network(), F.cross_entropy, (x, y)).value()
    )


def test_wrappers_are_opened():
    x, y = drawn()
    model = network(nn.Tanh())

    class Compiled(nn.Module):  # as `torch.compile` makes it; compiled backward passes have no second derivative
        def __init__(self):
            super().__init__()
            self._orig_mod = model

        def forward(self, x):
            raise AssertionError("the compiled module must not run")

    for wrapped in (Compiled(), nn.DataParallel(model)):
        problem = Problem(wrapped, F.cross_entropy, (x, y))
        assert problem.names[0] == "0.weight"
        assert close(problem.value(), F.cross_entropy(model(x), y))


# Reading data (pitfall 10)


class Stream(IterableDataset):
    """Batches made anew in every pass."""

    def __init__(self, how: str) -> None:
        self.how, self.passes = how, 0

    def __iter__(self):
        x, y = drawn()
        self.passes += 1
        if self.how == "once" and self.passes > 1:
            return
        noise = {"steady": 0.0, "augmented": torch.rand(()).item(), "numpy": np.random.rand()}.get(self.how, 0.0)
        parts = list(zip((x + noise).split(5), y.split(5)))
        yield from parts if self.how != "shuffled" or self.passes % 2 else parts[::-1]


@pytest.mark.parametrize(
    ("how", "words"),
    [("once", "one-shot"), ("augmented", "augmentation"), ("numpy", "augmentation"), ("shuffled", "shuffling")],
)
def test_data_that_changes_between_passes_is_refused(how, words):
    with pytest.raises(ValueError, match=words):
        Problem(network(), F.cross_entropy, Stream(how)).value()


def test_reading_moves_no_random_state():
    x, y = drawn()
    model = network(nn.Dropout(0.5))
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), batch_size=5, generator=own)
    before, state = fingerprint(model), own.get_state()
    for data in (Stream("steady"), loader):
        problem = Problem(model, F.cross_entropy, data)
        assert close(problem.value(), Problem(model, F.cross_entropy, (x, y)).value())
        list(problem.batches())
        assert fingerprint(model) == before and torch.equal(own.get_state(), state)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (lambda x, y: iter([(x, y)]), ValueError, "one-shot"),
        (lambda x, y: (b for b in [(x, y)]), ValueError, "list"),
        (lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True), ValueError, "shuffle=False"),
        (lambda x, y: TensorDataset(x, y), TypeError, "DataLoader"),
        (lambda x, y: [], ValueError, "at least one batch"),
        (lambda x, y: x, TypeError, "iterable"),
        (lambda x, y: 3, TypeError, "iterable"),
        (lambda x, y: (x,), TypeError, "length 1"),
        (lambda x, y: [{"x": x}], ValueError, "give forward="),
    ],
)
def test_bad_data(data, error, words):
    x, y = drawn()
    with pytest.raises(error, match=words):
        Problem(network(), F.cross_entropy, data(x, y)).value()


# Bad losses


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), ValueError, "scalar"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "reduction"),
        (functools.partial(F.cross_entropy, reduction="none"), ValueError, "reduction"),
        (lambda o, t: 1.0, TypeError, "float"),
        (lambda o, t: o.argmax(1).sum(), TypeError, "int64"),
        (None, TypeError, "function"),
    ],
)
def test_bad_losses(loss, error, words):
    with pytest.raises(error, match=words):
        Problem(network(), loss, drawn()).gradient()


def test_what_is_not_finite_is_named():
    x, y = drawn()

    class Bad(nn.Module):
        def forward(self, x):
            return (x - 1e9).sqrt()

    with pytest.raises(ValueError, match="output of module 1 is not finite"):
        Problem(network(Bad()), F.cross_entropy, (x, y)).gradient()
    with pytest.raises(ValueError, match="batch itself"):
        Problem(network(), F.cross_entropy, (x / 0, y)).gradient()
    model = network()
    model[0].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="0.bias is not finite"):
        Problem(model, F.cross_entropy, (x, y)).gradient()


# What varies (pitfalls 7 and 8)


def test_parameters_by_name_glob_and_predicate():
    model, data = network(), drawn()
    names = lambda params: Problem(model, F.cross_entropy, data, params=params).names  # noqa: E731
    assert names(None) == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert names("1.*") == ("1.weight", "1.bias")
    assert names(["1.bias", "0.*t"]) == ("0.weight", "1.bias")
    assert names(lambda n, p: p.ndim == 1) == ("0.bias", "1.bias")
    model[0].weight.requires_grad_(False)
    assert names("*") == ("0.bias", "1.weight", "1.bias")
    for params, words in (("2.*", "match a parameter"), ("0.weight", "frozen"), (lambda n, p: False, "at least one")):
        with pytest.raises(ValueError, match=words):
            names(params)


def test_a_restricted_problem_is_a_part():
    model, data = network(nn.Tanh()), drawn()
    problem = Problem(model, F.cross_entropy, data)
    part = problem.restrict(["2.bias", "0.weight"])
    whole, flat = problem.unflatten(problem.gradient()[1]), part.unflatten(part.gradient()[1])
    assert list(flat) == ["0.weight", "2.bias"]
    assert all(torch.equal(flat[n], whole[n]) for n in flat)
    with pytest.raises(ValueError, match="0.wight"):
        problem.restrict(["0.wight"])


def test_flatten_and_unflatten_are_inverse():
    problem = Problem(network(), F.cross_entropy, drawn())
    v = torch.arange(float(problem.size))
    assert torch.equal(problem.flatten(problem.unflatten(v)), v)
    named = problem.unflatten(v)
    with pytest.raises(ValueError, match="1.bias"):
        problem.flatten({n: t for n, t in named.items() if n != "1.bias"})
    with pytest.raises(ValueError, match="shape"):
        problem.flatten({**named, "1.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="shape"):
        problem.unflatten(v[1:])


def test_tied_parameters_count_once_under_every_name():
    model, loss, batch = BY_NAME["tied"].make()
    problem = Problem(model, loss, batch)
    assert problem.names == ("embedding.weight", "mix.weight", "mix.bias")
    assert Problem(model, loss, batch, params="head.weight").names == ("embedding.weight",)
    assert close(problem.gradient()[1], flat_gradient(loss(model(batch[0]), batch[1]), model.parameters()))


def test_integer_and_complex_parameters():
    x, y = drawn()
    model = network()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    assert "table" not in Problem(model, F.cross_entropy, (x, y)).names
    with pytest.raises(ValueError, match="int64"):
        Problem(model, F.cross_entropy, (x, y), params="table")
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="phase"):
        Problem(model, F.cross_entropy, (x, y))
    with pytest.raises(ValueError, match="at least one parameter"):
        Problem(nn.ReLU(), F.cross_entropy, (x, y))
    with pytest.raises(TypeError, match="lazy"):
        Problem(nn.LazyLinear(3), F.cross_entropy, (x, y))


def test_unused_frozen_and_strided_parameters():
    x, y = drawn()
    model = network(nn.Tanh())
    model.unused = nn.Parameter(torch.ones(2))
    model[0].weight = nn.Parameter(torch.randn(5, 4).T)
    assert not model[0].weight.is_contiguous()
    problem = Problem(model, F.cross_entropy, (x, y))
    named = problem.unflatten(problem.gradient()[1])
    assert torch.equal(named["unused"], torch.zeros(2))
    (want,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].weight])
    assert close(named["0.weight"], want)


def test_sparse_and_padded_embeddings():
    ids, targets = torch.tensor([[0, 1, 2], [3, 0, 4]]), torch.tensor([[1, 2, 0], [2, 1, 0]])
    for options in ({"sparse": True}, {"padding_idx": 0}):
        model = nn.Sequential(nn.Embedding(5, 3, **options))
        nn.init.normal_(model[0].weight)
        before = fingerprint(model)
        gradient = Problem(model, per_token, (ids, targets)).gradient()[1].view(5, 3)
        assert fingerprint(model) == before
        per_token(model(ids), targets).backward()
        assert close(gradient, model[0].weight.grad.to_dense())  # the padding row is held fixed
