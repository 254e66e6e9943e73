"""How often the 95 % intervals of each law contain the truth, over generated tables: `python bench/laws_coverage.py`.

Every table is drawn from the law itself (`tests/laws/cases.py`) with independent noise, or with half of its variance common
to the rows of a run and the bootstrap over runs. Counted are the intervals of every coefficient and of a forecast beyond the
table. With 300 tables a coverage of 95 % shows as 95 +- 1.3.

    OMP_NUM_THREADS=1 python bench/laws_coverage.py [--tables 300] [--draws 400] [--first 10000] [law ...]

Table k is drawn with seed first + k; the tables of `tests/laws` are those from seed 0 on, so the default is tables that no
choice made in the package has seen.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.laws.cases import CASES  # noqa: E402
from tests.laws.contract import hits  # noqa: E402


def main() -> None:
    """Print one line per law and kind of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=300)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--first", type=int, default=10_000)
    parser.add_argument("laws", nargs="*", help="names; none: all")
    asked = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {datetime.date.today()}: {asked.tables} tables from seed {asked.first}, {asked.draws} draws"
    )
    print("| law | noise | rows | runs | coverage, % | s |\n|---|---|---|---|---|---|")
    for case in CASES:
        if asked.laws and case.law.name not in asked.laws:
            continue
        drawn = replace(case, law=replace(case.law, draws=asked.draws))
        for grouped in (False, True):
            begin = time.perf_counter()
            found = hits(drawn, range(asked.first, asked.first + asked.tables), grouped=grouped)
            told = ", ".join(f"{name} {100 * n / asked.tables:.1f}" for name, n in found.items())
            noise, runs = ("grouped", case.group.max() + 1) if grouped else ("independent", "")
            spent = time.perf_counter() - begin
            print(f"| {case.law.name} | {noise} | {case.group.size} | {runs} | {told} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
