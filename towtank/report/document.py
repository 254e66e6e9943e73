"""A self-contained HTML page with figures: it fetches nothing and runs nothing but its own two scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

import towtank
from towtank.report import text

_EMPTY_STYLE = ""  # plotly fills one empty style element by script; the hash of nothing allows that and no more
_STYLE_GUARD = re.compile(r'getElementById\("([0-9a-f]{64})"\)')


@dataclass(frozen=True)
class Section:
    """A part of a page: figures under a heading, and what a reader should see in them.

    Args:
        id: identifier of the section in the page.
        heading: its title.
        figures: one a panel; without any the section is left out.
        reading: sentences beside the figures.
    """

    id: str
    heading: str
    figures: Sequence[go.Figure]
    reading: Sequence[str] = ()


def render(template: str, sections: Sequence[Section], twins: Mapping[str, str], **content: Any) -> str:
    """A page as one HTML document.

    Args:
        template: name of the template that lays it out.
        sections: its figures.
        twins: for every colour of the figures its twin on a dark page.
        content: what else the template shows.

    Returns:
        HTML, with a content security policy that allows exactly the scripts and styles in it.
    """
    shown = [section for section in sections if section.figures]
    specs = {f"{s.id}-{i}": json.loads(str(fig.to_json())) for s in shown for i, fig in enumerate(s.figures)}
    plotly_js, page_js, css = plotly.offline.get_plotlyjs(), _source("page.js"), _source("style.css")
    return (
        _environment()
        .get_template(template)
        .render(
            csp=policy(scripts=[plotly_js, page_js], styles=[css, _EMPTY_STYLE]),
            css=Markup(css),
            plotly_js=Markup(plotly_js),
            page_js=Markup(page_js),
            data=Markup(embed({"figures": specs, "twins": dict(twins)})),
            style_guards=sorted(set(_STYLE_GUARD.findall(plotly_js))),
            sections=[_laid_out(section) for section in shown],
            version=towtank.__version__,
            **content,
        )
    )


def write(html: str, path: Path) -> Path:
    """Write a page, whole or not at all.

    Args:
        html: the document.
        path: the file; its folder must exist.

    Returns:
        `path`.

    Raises:
        OSError: if the file cannot be written; an older page then stays as it was.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as out:
            out.write(html)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


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


def _laid_out(section: Section) -> dict[str, Any]:
    panels = [
        (f"{section.id}-{i}", int(fig.layout.height), _label(fig, section.heading))
        for i, fig in enumerate(section.figures)
    ]
    reading = [text.clean(line, 500) for line in section.reading]
    return {"id": section.id, "heading": section.heading, "panels": panels, "reading": reading}


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


def _source(name: str) -> str:
    source, _, _ = jinja2.PackageLoader("towtank.report", "templates").get_source(_environment(), name)
    return source.replace("\r\n", "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
