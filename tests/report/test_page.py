"""The report is one inert file: whatever a name holds, the document keeps its shape, and a browser runs only our scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
import html.parser
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import html5lib
import plotly.offline
import pytest

from tests.report import sample
from towtank.report import figures, page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
NAMES = {
    "script": "<script>document.title='owned'</script>",
    "attribute": "\"><img src=x onerror=\"document.title='owned'\">' onload='x",
    "bidi": "abc\u202egnp.exe\u2066",
    "long": "x" * 10_000,
    "emoji": "ship \U0001f6a2 ⛵",
    "template": "{{ 7 * 7 }}{% raw %}</style></title></textarea><!--",
    "link": "<a href='https://example.org'>https://example.org/</a> javascript:alert(1)",
}


STUB = "window.Plotly = { react() {}, Plots: { resize() {} } };"  # stands in for the 5 MB of plotly where a page is only parsed


@pytest.fixture
def small(monkeypatch):
    """Pages with the stub for plotly."""
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: STUB)


@functools.cache
def hostile(name):
    """The page of an answer full of this name; call it under `small`."""
    text = page.render(sample.hostile(name))
    assert STUB in text
    return text, parse(text)


def parse(text):
    """The document as a browser would build it."""
    return html5lib.parse(text, treebuilder="etree", namespaceHTMLElements=False)


def shape(tree):
    """Every element with the names of its attributes, in document order."""
    return [(element.tag, sorted(element.attrib)) for element in tree.iter()]


def content(element):
    """Text of an element."""
    return "".join(element.itertext())


def digest(script):
    """The source expression of a script or style in a policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def policy_of(tree):
    """Directive to sources."""
    (meta,) = [m for m in tree.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    parts = [rule.split() for rule in meta.get("content").split(";")]
    return {part[0]: part[1:] for part in parts}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", NAMES)
def test_names_do_not_change_the_document(kind):
    (_, plain), (_, nasty) = hostile("plain"), hostile(NAMES[kind])
    assert shape(nasty) == shape(plain)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", NAMES)
def test_names_run_nothing_and_fetch_nothing(kind):
    text, tree = hostile(NAMES[kind])
    assert "\u202e" not in text and "\u2066" not in text
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in (
                "src",
                "srcset",
                "style",
                "action",
                "background",
                "poster",
            )
            assert name != "href" or value == "#main"
            assert len(value) < 1500
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "img", "form")
        assert len(element.text or "") < 2000 or element.tag in ("script", "style")
    assert not any("url(" in content(s) or "@import" in content(s) for s in tree.iter("style"))


@pytest.mark.usefixtures("small")
def test_user_text_is_shown_as_it_is():
    _, tree = hostile(NAMES["script"])
    assert content(next(tree.iter("h1"))) == NAMES["script"]
    assert any(NAMES["script"] in content(td) for td in tree.iter("td"))


def test_policy_allows_exactly_what_is_in_the_page():
    text = page.render(sample.answer())
    found = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(found) == 2 and len(found[0]) > 1e6
    with_stub = parse(text.replace(found[0], ""))
    policy = policy_of(with_stub)
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == [digest(script) for script in found]
    assert policy["style-src"] == list(dict.fromkeys(digest(content(s)) for s in with_stub.iter("style")))
    assert policy["img-src"] == ["data:"]
    assert set(policy) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}


@pytest.mark.usefixtures("small")
def test_figure_data_is_whole():
    tree = parse(page.render(sample.answer()))
    (data,) = [s for s in tree.iter("script") if s.get("type") == "application/json"]
    assert "<" not in content(data)
    loaded = json.loads(content(data))
    places = {d.get("id") for d in tree.iter("div") if "plot" in (d.get("class") or "").split()}
    assert set(loaded["figures"]) == places and len(places) == 10
    assert loaded["twins"] == figures.dark_twins(sample.answer())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("answer", [sample.answer(), sample.refused(), sample.empty()], ids=["ok", "refused", "empty"])
def test_document_is_accessible(answer):
    text = page.render(answer)
    html5lib.HTMLParser(strict=True).parse(text)
    tree = parse(text)
    assert tree.get("lang") == "en" and answer.study in content(next(tree.iter("title")))
    levels = [int(e.tag[1]) for e in tree.iter() if re.fullmatch(r"h[1-6]", str(e.tag))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(e.get("aria-label") for e in tree.iter("div") if e.get("role") == "img")
    assert all(th.get("scope") == "col" for th in tree.iter("th"))


@pytest.mark.usefixtures("small")
def test_everything_the_answer_knows_is_told():
    answer = sample.answer()
    tree = parse(page.render(answer))
    told = " ".join(content(next(tree.iter("main"))).split())
    known = [answer.question, answer.sentence, answer.corpus, *answer.reproduce, "2.13.0", "held", "0.1M tokens a run"]
    known += [arm.verification.reason for arm in answer.arms if arm.verification] + ["-0.89 [-1.02, -0.75]", "468,992"]
    for part in known:
        assert part in told
    (table,) = [t for t in tree.iter("table") if t.get("id") == "runs"]
    assert len(list(table.iter("tr"))) == len(answer.runs) + 1


@pytest.mark.usefixtures("small")
def test_refusal_shows_the_reason_and_no_prediction():
    answer = sample.refused()
    tree = parse(page.render(answer))
    (box,) = [s for s in tree.iter("section") if "refuse" in (s.get("class") or "")]
    assert answer.verdict.reason in content(box)
    assert "Predictions at the target" not in content(tree)


@pytest.mark.usefixtures("small")
def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    assert page.write_report(sample.answer(), path) == path
    before = path.read_bytes()
    assert b"</html>" in before and stat.S_IMODE(path.stat().st_mode) & 0o400

    def broken(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        page.write_report(sample.empty(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def browse(path, *options):
    """The document after the scripts of a page have run, and what the browser logged."""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    quiet = ("first-run", "background-networking", "component-update", "sync")
    flags = ["--headless", "--disable-gpu", "--disable-quic", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    flags += ["--no-first-run", *(f"--disable-{q}" for q in quiet[1:]), f"--user-data-dir={path.parent / 'profile'}"]
    command = [str(CHROMIUM), *sandbox, *flags, *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=90, check=True)
    return done.stdout.decode(), done.stderr.decode()


class Rows(html.parser.HTMLParser):
    """Texts of the cells of the table of runs, and the attributes of its headings."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.rows, self.heads = False, [], []
        self.feed(text[text.index('<table id="runs"') : text.index("</table>", text.index('<table id="runs"'))])

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append(([], dict(attrs)))
        if tag == "th":
            self.heads.append(dict(attrs))
        self.inside = tag == "td"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][0].append(data)


@needs_chromium
def test_browser_draws_every_figure_and_runs_no_injected_script(tmp_path):
    answer = sample.hostile(NAMES["script"] + NAMES["attribute"])
    dom, log = browse(page.write_report(answer, tmp_path / "report.html"))
    dom = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    drawn = re.findall(r'<div class="plot [^>]*js-plotly-plot', dom)
    assert len(drawn) == 10 and dom.count('<svg class="main-svg"') >= 10
    assert "<title>owned" not in dom and "Share chart" not in dom
    assert "<img" not in dom
    assert not re.search(r"Content Security Policy|Uncaught|CONSOLE.*(error|Error)", log), log[-2000:]


@needs_chromium
@pytest.mark.usefixtures("small")
def test_browser_sorts_and_filters_the_runs(tmp_path):
    text = page.render(sample.answer())
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    act = """<script>
      const loss = document.querySelectorAll("#runs th button")[7]; loss.click(); loss.click();
      const filter = document.getElementById("filter"); filter.value = "mup 128"; filter.dispatchEvent(new Event("input"));
    </script></body>"""
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", act), encoding="utf-8")
    dom, _ = browse(path)
    table = Rows(dom)
    assert table.heads[7]["aria-sort"] == "descending" and table.heads[0]["aria-sort"] == "none"
    losses = [cells[7] for cells, _ in table.rows if cells]
    numbers = [float(v) for v in losses if v != "-"]
    assert numbers == sorted(numbers, reverse=True) and losses[-3:] == ["-"] * 3
    shown = [cells for cells, attributes in table.rows if cells and "hidden" not in attributes]
    assert len(shown) == 16 and {(c[0], c[1]) for c in shown} == {("mup", "128")}
    assert ">16 of 108 runs</output>" in dom


def test_plotly_comes_from_the_installed_package():
    assert Path(plotly.offline.__file__).exists() and "</script" not in plotly.offline.get_plotlyjs().lower()
