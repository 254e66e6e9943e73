"""Records as rows of a table: what ran counts, and a run that diverged has no loss."""

from __future__ import annotations

from towtank.record.record import Loss, Record
from towtank.study.rows import rows_of


def run(width, status, final=None, curve=(), **signals):
    return Record(
        id=f"{width}-{status}", config={"width": width, "lr": 0.1}, status=status, steps=9, stage="grid",
        loss=Loss(initial=5.0, final=final, curve=list(curve)), signals=signals,
    )  # fmt: skip


def test_diverged_runs_have_no_loss_and_failed_ones_no_row():
    done = run(32, "done", 2.5, [(3, 2.4), (6, float("nan"))], logit=[(3, 7.0), (6, None)])
    first, second = rows_of([done, run(64, "diverged", 9.0, [(3, 4.0)]), run(64, "oom"), run(64, "failed")])
    assert {key: first[key] for key in ("width", "lr", "status", "stage", "steps")} == {
        "width": 32, "lr": 0.1, "status": "done", "stage": "grid", "steps": 9,
    }  # fmt: skip
    assert [first[key] for key in ("loss", "loss_best", "loss_initial", "logit")] == [2.5, 2.4, 5.0, 7.0]
    assert [second[key] for key in ("width", "status", "loss", "loss_best")] == [64, "diverged", None, 4.0]
