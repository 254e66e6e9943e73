"""The report: one self-contained HTML file that fetches nothing and runs nothing but its own two scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

import towtank
from towtank.report import figures, readings, tables, text
from towtank.report.answer import Answer

# (name of the function in `figures` and in `readings`, heading)
SECTIONS = (
    ("loss_against_rate", "Loss against learning rate"),
    ("optimum_against_size", "Best learning rate against size"),
    ("backtests", "Would it have predicted what we know?"),
    ("sensitivity_by_size", "Learning-rate sensitivity"),
    ("attention_logits", "Attention logits"),
    ("best_loss_against_size", "Best loss against size"),
)
_EMPTY_STYLE = ""  # plotly fills one empty style element by script; the hash of nothing allows that and no more
_STYLE_GUARD = re.compile(r'getElementById\("([0-9a-f]{64})"\)')


def write_report(answer: Answer, path: Path) -> Path:
    """Write the report, whole or not at all.

    Args:
        answer: what was found out.
        path: the file; its folder must exist.

    Returns:
        `path`.

    Raises:
        OSError: if the file cannot be written; an older report then stays as it was.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            out.write(render(answer))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def render(answer: Answer) -> str:
    """The report as one HTML document.

    Args:
        answer: what was found out.

    Returns:
        HTML, with a content security policy that allows exactly the scripts and styles in it.
    """
    sections, specs = _sections(answer)
    plotly_js, page_js, css = plotly.offline.get_plotlyjs(), _template("page.js"), _template("style.css")
    data = embed({"figures": specs, "twins": figures.dark_twins(answer)})
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            answer=answer,
            csp=policy(scripts=[plotly_js, page_js], styles=[css, _EMPTY_STYLE]),
            css=Markup(css),
            plotly_js=Markup(plotly_js),
            page_js=Markup(page_js),
            data=Markup(data),
            style_guards=sorted(set(_STYLE_GUARD.findall(plotly_js))),
            sections=sections,
            tables=tables,
            cards=tables.cards(answer),
            limits=readings.LIMITS,
            evidence=readings.evidence(answer),
            version=towtank.__version__,
        )
    )


def policy(scripts: list[str], styles: list[str]) -> str:
    """The content security policy of a page with these inline scripts and styles.

    Args:
        scripts: text of each script element.
        styles: text of each style element.

    Example:
        >>> policy([], [""]).split("; ")[2]
        "style-src 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
    """
    rules = ["default-src 'none'", _sources("script-src", scripts), _sources("style-src", styles)]
    return "; ".join([*rules, "img-src data:", "base-uri 'none'", "form-action 'none'"])


def embed(data: Any) -> str:
    r"""JSON for a script element: nothing in it can end the element or start markup.

    Example:
        >>> embed({"a": "</script>"})
        '{"a":"\\u003c/script\\u003e"}'
    """
    plain = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sources(kind: str, texts: list[str]) -> str:
    digests = (hashlib.sha256(t.encode()).digest() for t in texts)
    return (
        " ".join([kind, *(f"'sha256-{base64.b64encode(d).decode()}'" for d in digests)]) if texts else f"{kind} 'none'"
    )


def _sections(answer: Answer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sections that have something to show, and the figure data by element id."""
    sections, specs = [], {}
    for name, heading in SECTIONS:
        drawn = getattr(figures, name)(answer)
        panels = [(f"{name}-{i}", fig) for i, fig in enumerate(drawn)]
        specs |= {key: json.loads(str(fig.to_json())) for key, fig in panels}
        if panels:
            heights = [(key, int(fig.layout.height), _label(fig, heading)) for key, fig in panels]
            reading = [text.clean(line, 500) for line in getattr(readings, name)(answer)]
            sections.append({"id": name, "heading": heading, "panels": heights, "reading": reading})
    return sections, specs


def _label(fig: Any, heading: str) -> str:
    """What a screen reader says of a figure."""
    axes = f"{fig.layout.yaxis.title.text or 'rows'} against {fig.layout.xaxis.title.text}"
    return ": ".join(part for part in (heading, fig.layout.title.text, axes) if part)


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("towtank.report", "templates")
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    env.lstrip_blocks = True
    env.filters |= {"clean": text.clean, "number": text.number, "size": text.size, "interval": text.interval}
    env.filters |= {"duration": text.duration}
    env.globals |= {"verdict_words": text.VERDICT_WORDS}
    return env


def _template(name: str) -> str:
    source, _, _ = jinja2.PackageLoader("towtank.report", "templates").get_source(_environment(), name)
    return source.replace("\r\n", "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
