"""Tables from files of every kind: the same numbers, or one line that says where the file is wrong."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from towtank.laws.read import read_table, rows, select


def read(tmp_path, text, name="runs.csv"):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(file)


def same(table, expected):
    """Whether two tables have the same columns in the same order; NaN equals NaN."""
    assert list(table) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name], values)


CSV = {
    "plain": "N,loss\n1e6,3.5\n1e7,3.0\n",
    "quoted": '"N","loss"\n"1e6","3.5"\n"1e7",3.0\n',
    "windows": "N,loss\r\n1e6,3.5\r\n1e7,3.0\r\n",
    "no last newline, blank lines, spaces": "N , loss\n\n1e6 , 3.5\n\n1e7,3.0",
    "byte order mark": b"\xef\xbb\xbfN,loss\n1e6,3.5\n1e7,3.0\n",
    "utf-16 of a spreadsheet": "N,loss\n1e6,3.5\n1e7,3.0\n".encode("utf-16"),
}


@pytest.mark.parametrize("kind", CSV)
def test_csv_of_every_make_gives_the_same_columns(tmp_path, kind):
    same(read(tmp_path, CSV[kind]), {"N": [1e6, 1e7], "loss": [3.5, 3.0]})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "N\tdata\tloss\n1e6\tc4, en\t3.5\n1e7\trpj\t\n"),
        ("a.jsonl", '{"N": 1e6, "data": "c4, en", "loss": 3.5}\n\n{"N": 10000000, "data": "rpj", "loss": null}\n'),
        ("a.json", '[{"N": 1e6, "data": "c4, en", "loss": 3.5}, {"N": 1e7, "data": "rpj"}]'),
        ("b.json", '{"N": [1e6, 1e7], "data": ["c4, en", "rpj"], "loss": [3.5, null]}'),
        ("a.csv", 'N,data,loss\n1e6,"c4, en",3.5\n1e7,rpj,NA\n'),
    ],
)
def test_one_table_in_five_formats(tmp_path, name, text):
    same(read(tmp_path, text, name), {"N": [1e6, 1e7], "data": ["c4, en", "rpj"], "loss": [3.5, np.nan]})


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"N": [1, 2], "data": ["a", "b"], "loss": [3.5, None]}), tmp_path / "a.parquet")
    same(read_table(tmp_path / "a.parquet"), {"N": [1, 2], "data": ["a", "b"], "loss": [3.5, np.nan]})
    with pytest.raises(ValueError, match="expected a Parquet file"):
        read(tmp_path, "N,loss\n", "b.parquet")


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"install towtank\[pandas\]"):
        read(tmp_path, b"PAR1", "a.parquet")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "at least one row, got none"),
        ("a.csv", "N,loss\n", "at least one row, got none"),
        ("a.csv", "N,loss\n1,2\n1,2,3\n", "line 3: expected 2 fields as in the header, got 3"),
        ("a.csv", 'N,note,loss\n1,"two\nlines",2\n1,2\n', "line 4: expected 3 fields"),
        ("a.csv", "N;loss\n1;2,5\n", "expected commas between fields, got semicolons; save it as .csv with commas"),
        ("a.csv", "N\tloss\n1\t2\n", "got tabs"),
        ("a.csv", "N,N\n1,2\n", "expected every column once, got N twice"),
        ("a.csv", 'N,loss\n1,"2\n', "line 2: unexpected end of data"),
        ("a.csv", b"N,loss\n1,\xe9\n", "expected text in UTF-8, got a byte 0xe9"),
        ("a.jsonl", '{"N": 1}\n{"N": \n', "line 2: expected a JSON object, got: "),
        ("a.jsonl", "[1, 2]\n", "line 1: expected a JSON object, got list"),
        ("a.json", '{"N": [1], "loss": [1, 2]}', "expected columns of equal length, got {'N': 1, 'loss': 2}"),
        ("a.json", '{"N": 1}\n{"N": 2}', "expected JSON, got: "),
        ("a.json", "[]", "expected a list of rows"),
        ("a.xlsx", "", "expected .csv, .tsv, .jsonl"),
    ],
)
def test_a_file_that_is_no_table_is_told_in_one_line(tmp_path, name, text, said):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, text, name)
    assert said in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(FileNotFoundError):
            read_table(tmp_path / name)


def test_a_chart_of_wandb_becomes_a_row_a_run_and_step(tmp_path):
    head = '"Step","small - big - val/loss","small - big - val/loss__MIN","small - big - val/loss__MAX","b - lr"\n'
    table = read(tmp_path, head + '"0","3.5","3.4","3.6",""\n"10","3.0","3.0","3.0","0.1"\n')
    expected = {"run": ["small - big"] * 2 + ["b"], "Step": [0, 10, 10], "val/loss": [3.5, 3.0, np.nan]}
    same(table, expected | {"lr": [np.nan, np.nan, 0.1]})


def test_a_history_of_wandb_keeps_what_json_cannot_hold(tmp_path):
    lines = [{"_step": 0, "train/loss": 3.5}, {"_step": 1, "train/loss": "NaN", "opt": {"lr": 0.1}}]
    table = read(tmp_path, "\n".join(map(json.dumps, lines)), "history.jsonl")
    same(table, {"_step": [0, 1], "train/loss": [3.5, np.nan], "opt.lr": [np.nan, 0.1]})


def test_downloads_of_tensorboard_are_joined_by_run_and_step(tmp_path):
    (tmp_path / "run-a_b-tag-loss.csv").write_text("Wall time,Step,Value\n1.5,0,3.5\n2.5,10,3.0\n")
    (tmp_path / "run-a_b-tag-lr.json").write_text("[[1.5, 0, 0.1], [2.5, 10, 0.2]]")
    (tmp_path / "run-c-tag-loss.csv").write_text("Wall time,Step,Value\n1.5,0,3.2\n")
    one = {"run": ["a_b", "a_b"], "step": [0, 10], "loss": [3.5, 3.0]}
    same(read_table(tmp_path / "run-a_b-tag-loss.csv"), one)
    every = {"run": ["a_b", "a_b", "c"], "step": [0, 10, 0], "loss": [3.5, 3.0, 3.2]}
    same(read_table(tmp_path), every | {"lr": [0.1, 0.2, np.nan]})
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="notes.csv: expected a download of TensorBoard"):
        read_table(tmp_path)


def test_event_files_need_their_package_and_a_bare_folder_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="or a study folder, got neither"):
        read_table(tmp_path)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.plugin_event_accumulator", None)
    with pytest.raises(ImportError, match="need the package tensorboard; install it, or download"):
        read_table(tmp_path)


def test_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    writers = pytest.importorskip("torch.utils.tensorboard")
    for run, offset in (("a", 0.0), ("b/c", 1.0)):
        with writers.SummaryWriter(tmp_path / run) as out:
            for step in range(3):
                out.add_scalar("loss", 3.0 - 0.5 * step + offset, step)
                out.add_scalar("lr", 0.25, step)
            out.add_text("note", "no number")
    table = read_table(tmp_path)
    losses = [3.0, 2.5, 2.0, 4.0, 3.5, 3.0]  # exact in float32
    same(table, {"run": ["a"] * 3 + ["b/c"] * 3, "step": [0, 1, 2] * 2, "loss": losses, "lr": [0.25] * 6})


TABLE = {"N": np.array([1e6, 1e7, 1e8, np.nan]), "data": ["c4", "rpj", "C4", ""], "fused": [True, False, True, None]}


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ([], [0, 1, 2, 3]),
        (["N<1e8"], [0, 1]),
        (["N <= 1e8", "N >= 1e7"], [1, 2]),
        (["N=1e6,1e8"], [0, 2]),
        (["N!=1e6"], [1, 2, 3]),
        (["data=c4"], [0, 2]),
        (["data!=c4", "N>0"], [1]),
        (["data="], [3]),
        (["fused=true"], [0, 2]),
    ],
)
def test_conditions_keep_the_rows_that_meet_them_all(conditions, kept):
    chosen = select(TABLE, conditions)
    same(chosen, {name: [values[i] for i in kept] for name, values in TABLE.items()})


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("N", "expected a column, one of = != < <= > >=, and a value"),
        ("dta=c4", "got 'dta'; did you mean 'data'?"),
        ("data<c4", "expected numbers on both sides of <"),
        ("N<many", "expected numbers on both sides of <"),
    ],
)
def test_conditions_that_cannot_be_read(condition, said):
    with pytest.raises(ValueError) as caught:
        select(TABLE, [condition])
    assert said in str(caught.value)


def test_many_rows(tmp_path):
    count = 100_000
    lines = "\n".join(f"{i},{2 * i}" for i in range(1, count + 1))
    table = read(tmp_path, f"N,loss\n{lines}\n")
    assert len(table["N"]) == count and table["loss"].sum() == count * (count + 1)
    assert len(rows(table, table["N"] > count - 2)["N"]) == 2
