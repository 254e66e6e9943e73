"""The layers of docs/design.md, held by reading every import in the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "towtank"
ALLOWED: dict[str, set[str]] = {
    "estimate": set(),
    "record": set(),
    "problem": {"estimate"},
    "linalg": {"estimate"},
    "curvature": {"problem", "linalg", "estimate"},
    "optim": set(),
    "losses": set(),
    "scaling": set(),
    "laws": {"estimate"},
    "signals": {"problem", "curvature", "linalg", "laws", "record", "estimate"},
    "integrations": {"signals", "problem", "record"},
    "train": {"optim", "losses", "scaling"},
    "study": {"train", "scaling", "record"},
    "report": {"study", "record", "laws", "estimate"},
    "cli": {
        "estimate",
        "record",
        "signals",
        "integrations",
        "problem",
        "linalg",
        "curvature",
        "optim",
        "losses",
        "scaling",
        "laws",
        "train",
        "study",
        "report",
    },
}
WITHOUT_TORCH = [
    "towtank",
    "towtank.laws",
    "towtank.record.record",
    "towtank.study.config",
    "towtank.report.answer",
    "towtank.cli",
]
LIGHT = {"torch", "numpy", "scipy", "plotly", "jinja2", "rich", "ray", "submitit"}


def imports(path: Path) -> set[str]:
    """Layers of towtank that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("towtank.") and n.count(".")}
    return found - {"__version__"}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    name = layer(path)
    assert name in ALLOWED, f"{name} is not in the table of docs/design.md"
    assert imports(path) <= ALLOWED[name] | {name}


def test_the_table_is_the_one_in_the_design() -> None:
    design = (PACKAGE.parent / "docs" / "design.md").read_text()
    rows = [line.split("|")[1:3] for line in design.splitlines() if line.startswith("| `")]
    written: dict[str, set[str]] = {}
    for names, allowed in rows:
        for name in (n.strip(" `") for n in names.split(",")):
            everything = allowed.strip() == "all"
            written[name] = (
                set(ALLOWED) - {name} if everything else {a.strip() for a in allowed.split(",") if a.strip()}
            )
    assert written == ALLOWED


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_reading_a_folder_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_towtank_and_its_command_line_is_light() -> None:
    code = f"import sys, towtank, towtank.cli; heavy = {LIGHT!r} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True)
