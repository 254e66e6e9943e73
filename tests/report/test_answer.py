"""The answer from records alone: arms, laws, predictions, verification, verdict, words."""

import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from tests.report.runs import INITIAL, grid, optimum, run, verification
from towtank.estimate import Verdict
from towtank.report.answer import answer, predict


@pytest.fixture(scope="module")
def records():
    runs = (
        grid("sp")
        + grid("mup")
        + [
            run(arm, w, round(optimum(arm, w)) + k, s, stage="refine")
            for arm in ("sp", "mup")
            for w in (32, 64, 128)
            for k in (-1, 0, 1)
            for s in (2, 3)
        ]
    )
    return runs + verification(runs, "sp") + verification(runs, "mup")


@pytest.fixture(scope="module")
def told(records):
    return answer(records, question="which rate?")


def arm_of(told, name):
    return next(arm for arm in told.arms if arm.name == name)


def with_rates(records, **changes):
    return [msgspec.structs.replace(r, config=r.config | changes) for r in records]


def test_arms_axis_and_target_are_found_from_the_records(told, records):
    assert [arm.name for arm in told.arms] == ["mup", "sp"]
    assert (told.size_axis, told.target, told.study) == ("width", 256.0, "lr-transfer")
    assert [s.size for s in told.arms[0].sizes] == [32, 64, 128]
    assert told.fixed == {"depth": 2} and told.environment == {"torch": "2.13.0"} and told.corpus == "c0ffee"
    assert len(told.runs) == len(records) and told.counts == {"done": len(records)}
    assert told.time_s == pytest.approx(2.0 * len(records))


def test_the_known_truth_is_found(told):
    for name, slope in (("sp", -0.9), ("mup", 0.0)):
        arm = arm_of(told, name)
        assert slope in arm.lr_law.coefficients["slope"]
        assert arm.lr_law.coefficients["slope"].value == pytest.approx(slope, abs=0.15)
        assert arm.lr_law.backtest.hit and arm.lr_law.verdict == Verdict("ok")
        assert 2.0 ** optimum(name, 256) in arm.prediction.lr
        assert arm.verification.held and arm.verification.factor < 1.5
        assert arm.verification.excess_loss < 0.05
    assert 0 not in arm_of(told, "sp").lr_law.coefficients["slope"]
    assert told.verdict == Verdict("ok")


def test_the_sentence_says_rate_interval_verdict_and_proof(told):
    assert told.sentence.startswith("At width 256, mup: use learning rate 2.")
    assert "sp: use learning rate 3." in told.sentence and "e-3 [" in told.sentence and "(ok)" in told.sentence
    assert "Verified: mup: held, the measured optimum" in told.sentence


def test_rate_points_are_plain_means(told, records):
    size = arm_of(told, "sp").sizes[0]
    rate = next(r for r in size.rates if r.lr == 2.0**-6)
    losses = [
        r.loss.final
        for r in records
        if r.config["lr"] == 2.0**-6 and r.config["width"] == 32 and r.config["parametrization"] == "sp"
    ]
    assert rate.runs == len(losses) == 4
    assert rate.loss == pytest.approx(np.mean(losses))
    assert rate.stderr == pytest.approx(np.std(losses, ddof=1) / 2)


def test_sensitivity_is_the_mean_over_seeds_of_the_published_number(told, records):
    size = arm_of(told, "sp").sizes[1]
    each = []
    for seed in (0, 1):
        curve = np.array(
            [
                r.loss.final
                for r in records
                if r.stage == "grid"
                and r.config["width"] == 64
                and r.config["parametrization"] == "sp"
                and r.config["seed"] == seed
            ]
        )
        each.append(np.mean(np.minimum(curve, INITIAL)) - curve.min())
    assert size.sensitivity == pytest.approx(np.mean(each))


def test_laws_are_drawn_up_to_the_target(told):
    law = arm_of(told, "sp").lr_law
    sizes = [s for s, _ in law.line]
    assert sizes == sorted(sizes) and sizes[0] == 32 and sizes[-1] == 256 and {64, 128} <= set(sizes)
    assert [s for s, _ in law.points] == [32, 64, 128]


def test_the_fitted_parabola_touches_the_optimum(told):
    size = arm_of(told, "mup").sizes[0]
    lr, loss = np.array(size.fitted).T
    assert loss.min() == pytest.approx(size.best_loss.value, abs=1e-3)
    assert abs(np.log2(lr[np.argmin(loss)] / size.optimum.value)) < 0.15


def test_verification_runs_only_judge(records):
    alone = predict([r for r in records if r.stage != "verify"], 256)
    assert alone == predict(records, 256)


def test_order_of_records_changes_nothing(told, records):
    order = np.random.default_rng(1).permutation(len(records))
    assert answer([records[i] for i in order], question="which rate?") == told


def test_everything_can_be_written_as_json(told):
    assert msgspec.json.decode(msgspec.json.encode(told))["target"] == 256


def test_takes_less_than_a_second(records):
    start = time.process_time()
    answer(records)
    assert time.process_time() - start < 2.0  # about 0.5 s on an idle core


def test_corpora_and_lengths_are_arms_of_their_own():
    runs = grid("sp", sd=0.0)
    other = [msgspec.structs.replace(r, corpus="beef", id=r.id + "b") for r in runs]
    longer = with_rates(runs, steps=400)
    told = answer(with_rates(runs, steps=200) + with_rates(other, steps=200) + longer)
    assert [arm.name for arm in told.arms] == [
        "corpus=beef, steps=200",
        "corpus=c0ffee, steps=200",
        "corpus=c0ffee, steps=400",
    ]
    assert all(rate.runs == 2 for arm in told.arms for s in arm.sizes for rate in s.rates)


def test_booleans_are_not_numbers():
    runs = [
        msgspec.structs.replace(r, config=r.config | {"flag": flag})
        for r in grid("sp", widths=(32,))
        for flag in (True, 1)
    ]
    assert {arm.name for arm in answer(runs).arms} == {"flag=True", "flag=1"}


def test_the_axis_may_be_depth_or_any_whole_number():
    deep = [
        msgspec.structs.replace(r, config=r.config | {"depth": r.config["width"] // 16, "width": 64})
        for r in grid("sp")
    ]
    assert answer(deep).size_axis == "depth"
    renamed = [
        msgspec.structs.replace(r, config={("layers" if k == "width" else k): v for k, v in r.config.items()})
        for r in grid("sp")
    ]
    assert answer(renamed).size_axis == "layers" and answer(renamed).arms[0].name == "all runs"
    with pytest.raises(ValueError, match="size_axis = 'hight'"):
        answer(deep, size_axis="hight")


def test_failed_runs_are_listed_and_counted_not_fitted(records):
    lost = [
        msgspec.structs.replace(run("sp", 64, -7.0, 9), status=s, loss=replace_loss(), id=s, reason="out of memory")
        for s in ("failed", "oom")
    ]
    told = answer(records + lost)
    assert told.counts == {"done": len(records), "failed": 1, "oom": 1} and len(told.runs) == len(records) + 2
    assert any("2 runs failed" in w for w in told.warnings)
    assert arm_of(told, "sp").sizes == arm_of(answer(records), "sp").sizes


def replace_loss():
    return run("sp", 32, -7.0, 0, diverged=True).loss


def test_diverged_runs_are_counted_and_cost_sensitivity():
    runs = [run("sp", w, float(x), s, diverged=x >= -4) for w in (32, 64, 128) for x in range(-10, -2) for s in (0, 1)]
    told = answer(runs, target=256)
    size = told.arms[0].sizes[2]
    assert [r.diverged for r in size.rates] == [0] * 6 + [2] * 2
    assert all(r.loss is None and r.stderr is None for r in size.rates[-2:])
    assert size.sensitivity > 2 * (INITIAL - 2.6) / 8
    assert told.arms[0].prediction.lr is not None


def test_all_diverged_is_a_refusal_with_a_next_grid():
    told = answer([run("sp", w, float(x), 0, diverged=True) for w in (32, 64, 128) for x in (-4, -3)], target=256)
    assert told.verdict.status == "refuse" and "cannot tell" in told.sentence
    assert "next grid" in told.arms[0].sizes[0].verdict.reason
    assert told.arms[0].sizes[0].sensitivity is None
    assert told.arms[0].prediction.lr is None and told.arms[0].lr_law.line == ()


def test_one_arm_that_refuses_does_not_silence_the_other():
    edge = grid("mup", rates=range(-13, -7))
    told = answer(grid("sp") + edge, target=256)
    assert arm_of(told, "sp").prediction.verdict.status == "ok"
    assert arm_of(told, "mup").prediction.verdict.status == "refuse"
    assert (
        told.verdict.status == "weak" and "mup: cannot tell" in told.verdict.reason and "sp" not in told.verdict.reason
    )
    assert "not bracketed" in arm_of(told, "mup").sizes[0].verdict.reason
    assert "mup: cannot tell the learning rate" in told.sentence and "Not verified" in told.sentence


def test_a_prediction_far_off_is_a_miss():
    runs = grid("sp")
    rate = predict(runs, 256)[0].lr.value
    wrong = [
        run("mup", 256, float(np.log2(rate)) + k, s, stage="verify", parametrization="sp")
        for k in (-1, 0, 1)
        for s in (0, 1)
    ]
    told = answer(runs + wrong)
    check = told.arms[0].verification
    assert check.held is False and check.measured is None and check.excess_loss > 0.05
    assert "do not bracket" in check.reason and "missed" in told.sentence
    assert told.verdict.status == "weak" and "verification missed" in told.verdict.reason


def test_a_flat_optimum_within_noise_holds():
    runs = grid("sp", sd=0.02)
    rate = predict(runs, 256)[0].lr.value
    flat = [
        run("sp", 256, float(np.log2(rate)) + k, s, stage="verify", final=2.2 - 0.001 * k + 0.002 * s)
        for k in (-1, 0, 1)
        for s in range(8)  # enough to contradict the curvature of the sizes fitted
    ]
    check = answer(runs + flat).arms[0].verification
    assert check.held and check.measured is None and "within noise" in check.reason


@pytest.mark.parametrize(("keep", "why"), [((0, 1), "2 rates tried"), ((-1, 1, 2), "no run near the predicted rate")])
def test_verification_is_not_told_from_too_few_runs(keep, why):
    runs = grid("sp")
    x = float(np.log2(predict(runs, 256)[0].lr.value))
    check = answer(runs + [run("sp", 256, x + k, 0, stage="verify") for k in keep]).arms[0].verification
    assert check.held is None and why in check.reason


def test_divergence_at_the_predicted_rate_is_a_miss():
    runs = grid("sp")
    x = float(np.log2(predict(runs, 256)[0].lr.value))
    tried = [run("sp", 256, x + k, s, stage="verify", diverged=k >= 0) for k in (-1, 0, 1) for s in (0, 1)]
    check = answer(runs + tried).arms[0].verification
    assert check.held is False and "diverged" in check.reason


def test_a_study_without_target_speaks_of_sensitivity_and_logits():
    """Losses and logits measured at width 64 with and without qk-norm, learning rates 1e-3 to 3e-1, one seed."""
    rates = np.log2([1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])
    losses = {False: [2.719, 2.570, 2.582, 2.682, 2.895, 3.023], True: [2.716, 2.558, 2.529, 2.561, 2.641, 2.746]}
    logits = {False: [7.4, 11.6, 37, 459, 9752, 234440], True: [4.6, 5.2, 6.5, 8.7, 17.9, 73.5]}
    runs = [
        run("sp", 64, x, 0, final=y, logit=z, qk_norm=norm)
        for norm in (True, False)
        for x, y, z in zip(rates, losses[norm], logits[norm], strict=True)
    ]
    told = answer(runs)
    assert told.target is None and [arm.name for arm in told.arms] == ["qk_norm=False", "qk_norm=True"]
    plain, normed = (arm.sizes[0] for arm in told.arms)
    assert plain.sensitivity == pytest.approx(0.175, abs=5e-4) and normed.sensitivity == pytest.approx(0.096, abs=5e-4)
    assert max(r.attention_logit_max for r in plain.rates) == 234440
    assert "learning-rate sensitivity 0.18 nats" in told.sentence
    assert "largest attention logit 234,440 (at learning rate 3.0e-1)" in told.sentence
    assert told.verdict.status in ("weak", "refuse") and all(arm.prediction is None for arm in told.arms)


def test_attention_laws_and_the_limit():
    """Logits that grow as lr^1.5 width^2 pass 1e4 at the target for large rates."""
    runs = [
        run("mup", w, float(x), s, logit=float(2.0 ** (1.5 * (x + 10) + 2 * np.log2(w / 32) + 4 + 0.05 * s)))
        for w in (16, 32, 64, 128)
        for x in range(-10, -2)
        for s in (0, 1)
    ]
    told = answer(runs, target=256)
    arm = told.arms[0]
    assert len(arm.attention_laws) == 8
    assert arm.attention_laws[3].name == "attention logit at lr 0.00781"
    assert arm.attention_laws[3].coefficients["slope"].value == pytest.approx(2, abs=0.05)
    expected = 2.0 ** (1.5 * (np.log2(arm.prediction.lr.value) + 10) + 6 + 4)
    assert expected in arm.prediction.attention_logit_max
    assert arm.prediction.stable is False and arm.prediction.verdict.status == "weak"
    assert "reaches 1e+04 near width" in arm.attention_laws[-1].verdict.reason


def test_without_attention_signals_stability_is_not_told(told):
    assert all(arm.prediction.stable is None and arm.attention_laws == () for arm in told.arms)


def test_no_records():
    told = answer([])
    assert told.verdict.status == "refuse" and told.arms == () and "Cannot tell" in told.sentence
    assert predict([], 256) == ()


def test_records_without_a_learning_rate_are_told(records):
    odd = msgspec.structs.replace(records[0], config={"width": 64})
    assert any("1 records have no positive learning rate" in w for w in answer([*records, odd]).warnings)


def test_a_size_far_away_is_refused(records):
    far = predict(records, 8192)
    assert all(
        p.lr is None and p.verdict.status == "refuse" and "beyond the fitted sizes" in p.verdict.reason for p in far
    )
    assert replace(far[0], arm="x").arm == "x"
    with pytest.raises(ValueError, match="positive size"):
        predict(records, -1)
