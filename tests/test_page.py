# SPDX-License-Identifier: GPL-2.0-or-later
"""report.html: what is on it, what a hostile guest can do to it, and how a browser shows it."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qemu_ioasid import config, page, picture
from qemu_ioasid.attempts import Column, Matrix
from qemu_ioasid.report import Attempt, Check, Report, load
from tests.conftest import Command

#: The largest page there is, whatever went into it.
LARGEST = 8 << 20
#: What a page is without its text.
VOID = {"meta", "br", "path", "use"}

MARKUP = (
    '</pre></style></title><script>document.title="owned"</script><img src=x onerror=alert(1)>'
    "\"><svg onload=alert(1)>' & <!-- ]]> <style>*{display:none}</style> &lt;b&gt;"
)
HOSTILE = MARKUP + "\x1b[2J\x00\x07\r\x7f\x9b31m\u202egnp\u2066\u200b\ufeff\ud800\U000e0041e\u0301"


def attempts() -> list[Attempt]:
    """One of each outcome."""
    return [
        Attempt("a", "g1", None, "g1", "DONE", "DONE", "allowed"),
        Attempt("a", "g1", 1, "g1", "DONE", "DONE", "allowed"),
        Attempt("a", "g1", 1, "g1", "FAULT", "FAULT", "faulted"),
        Attempt("b", "g1", 1, "g1", "REFUSED", "REFUSED", "refused"),
        Attempt("c", "g2", 1, "g1", "REFUSED", "DONE", "leaked"),
        Attempt("c", "g2", 2, "g2", "DONE", "REFUSED", "wrong"),
        Attempt("c", "host", 1048575, "", "REFUSED"),
    ]


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A report with everything on it, as report.json has it."""
    report = Report(tmp_path, "isolation", print, accelerator="tcg", rig=config.DEFAULT.read_text())
    report.accelerator_reason = "no /dev/kvm"
    report.vms = [
        {"name": "host", "viommu": "intel-iommu,scalable-mode=on", "mdevs": []},
        {"name": "g1", "viommu": "intel-iommu,pasid-bits=20", "mdevs": ["a", "b"]},
        {"name": "g2", "viommu": "intel-iommu,caching-mode=on", "mdevs": ["c"]},
    ]
    report.versions = {
        "kernel": {"release": "7.2.12", "hash": "562a"},
        "qemu": {"host": "11.1.3", "guests": "11.1.3"},
        "series": "1b8b",
    }
    with report.phase("boot"):
        pass
    with report.phase("between devices and VMs"):
        report.enter(Check("registered-a", "pass", "a copies", "DONE", "seen", 0.5))
        leak = Check("inter-vm", "fail", "c names", "DONE", "LEAK: g1", 0.1, "host: a\nhost: b")
        leak.attempts = attempts()
        report.enter(leak)
        report.enter(Check("later", "skip", "nothing", "nothing", "not asked"))
    with pytest.raises(KeyError), report.phase("after the guest's death"):
        raise KeyError
    report.fail(5, "host: oops: Oops: general protection fault", "Call Trace:\n pdma_execute")
    document: dict[str, Any] = json.loads(json.dumps(report.document()))
    return document


def each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of *value* in which every string but keys went through *change*."""
    if isinstance(value, dict):
        return {key: each_string(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [each_string(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


class Structure(HTMLParser):
    """Elements and attributes of a page, whose tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str, str]] = set()
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name, value or "") for name, value in attrs}
        if tag not in VOID - {"path", "use"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "h2" in self._open:
            self.headings.append(data)
        if "style" not in self._open:
            self.text += data


def test_everything_is_there_and_failures_come_first(document: dict[str, Any]) -> None:
    found = Structure(page.render(document))
    assert [heading.partition(":")[0] for heading in found.headings] == [
        "What went wrong",
        "Isolation",
        "Timeline",
        "All checks",
        "Provenance",
    ]
    for text in (
        "The kernel under test failed to boot or broke",
        "Exit code 5",
        "Call Trace:\n pdma_execute",
        "host: a\nhost: b",
        "in the step “after the guest's death”",
        "in the step “between devices and VMs”, after registered-a: pass",
        "release 7.2.12, hash 562a",
        "TCG; why not KVM: no /dev/kvm",
        "vIOMMU of g1",
        "intel-iommu,pasid-bits=20",
    ):
        assert text in found.text, text


def test_the_matrix_says_who_tried_what(document: dict[str, Any]) -> None:
    text = page.render(document)
    titles = {
        value for _, name, value in Structure(text).attributes if name == "title" and value[1:2]
    }
    assert titles == {
        "a of g1, no PASID: allowed in inter-vm",
        "a of g1, PASID 1: allowed in inter-vm",
        "a of g1, PASID 1: faulted in inter-vm",
        "b of g1, PASID 1: refused in inter-vm",
        "c of g2, PASID 1: leaked in inter-vm",
        "c of g2, PASID 2: wrong in inter-vm",
        "c of host, PASID 1048575: unanswered in inter-vm",
    }
    heads = re.findall(r'class="owner">([^<]+)<', text)
    assert heads == ["no PASID", "PASIDs of g1", "PASIDs of g2", "nobody's PASIDs"]


def test_a_leak_among_many_attempts_is_shown(document: dict[str, Any]) -> None:
    many = [Attempt("a", "g1", 1, "g1", "DONE", "DONE", each) for each in ("allowed", "refused")]
    many = many * 5 + [Attempt("a", "g1", 1, "g1", "REFUSED", "DONE", "leaked")]
    document["checks"][1]["attempts"] = json.loads(json.dumps([vars(each) for each in many]))
    assert "a of g1, PASID 1: leaked in inter-vm" in page.render(document)


def test_the_page_needs_nothing_and_runs_nothing(document: dict[str, Any]) -> None:
    text = page.render(document)
    found = Structure(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action"), (tag, name)
        assert name != "href" or value.startswith("#"), value
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert style and "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text


def test_hostile_text_is_text_and_nothing_else(document: dict[str, Any]) -> None:
    hostile = page.render(each_string(document, lambda text: f"{text}{HOSTILE}"))
    plain = Structure(page.render(each_string(document, lambda text: f"{text}!")))
    found = Structure(hostile)
    assert found.tags == plain.tags
    assert {name for _, name, _ in found.attributes} == {name for _, name, _ in plain.attributes}
    assert hostile.replace("\n", "").isprintable()
    hostile.encode()
    assert r"\x1b[2J\x00\x07\r\x7f\x9b31m\u202egnp\u2066\u200b\ufeff\ud800" in found.text


@pytest.mark.parametrize("text", ["x" * 50_000, "x\n" * 25_000, "\U000e0041<&" * 10_000])
def test_no_text_makes_the_page_huge(document: dict[str, Any], text: str) -> None:
    document["checks"] = document["checks"] * 20
    big = page.render(each_string(document, lambda old: old + text))
    assert len(big.encode()) < LARGEST
    Structure(big)


def test_no_number_of_things_makes_the_page_huge(document: dict[str, Any]) -> None:
    first = document["checks"][1]
    first["attempts"] = [
        {**attempt, "pasid": pasid, "device": f"d{pasid % 200}"}
        for pasid in range(1000)
        for attempt in first["attempts"]
    ]
    document["checks"] = [first, *({**first, "name": f"check-{n}"} for n in range(3))]
    document["checks"] += [{**first, "attempts": first["attempts"][:100]}] * 3000
    document["phases"] *= 1000
    document["versions"] = {f"v{n}": {f"w{m}": "x" * 99 for m in range(99)} for n in range(999)}
    big = page.render(document)
    assert len(big.encode()) < LARGEST


def test_what_does_not_fit_is_counted_and_is_not_what_leaked(document: dict[str, Any]) -> None:
    refused = {**vars(attempts()[3])}
    tried = [{**refused, "pasid": pasid, "device": f"d{pasid % 100}"} for pasid in range(1000)]
    tried[999]["outcome"] = "leaked"
    document["checks"] = [{**document["checks"][1], "attempts": tried}]
    matrix = Matrix(document)
    assert Column("g1", 999) in matrix.columns
    assert matrix.left_out == (39, 800)
    text = page.render(document)
    assert "39 more devices and 800 more PASIDs are in report.json only" in text
    assert "d99 of g1, PASID 999: leaked in inter-vm" in text
    assert "and 980 more" in text
    document["phases"] *= 50
    document["checks"] *= 501
    text = page.render(document)
    assert "50 more are in report.json only" in text and "1 more are in report.json only" in text


def test_of_a_long_excerpt_both_ends_are_kept(document: dict[str, Any]) -> None:
    document["error"]["evidence"] = "\n".join(f"line {n}" for n in range(1000))
    text = page.render(document)
    assert "line 0\n" in text and "line 999" in text and "(880 lines left out here)" in text


def test_reports_from_before_there_were_attempts(document: dict[str, Any]) -> None:
    for check in document["checks"]:
        del check["attempts"], check["phase"]
    for phase in document["phases"]:
        del phase["start"], phase["finished"]
    del document["started"], document["vms"], document["error"]["phase"]
    assert "No device was given work" in page.render(document)


def test_a_report_of_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path, "isolation", print, rig="not [ TOML")
    report.fail(130, "interrupted by Ctrl-C", "")
    report.write()
    text = (tmp_path / "report.html").read_text()
    assert "Interrupted" in text and "No check was made" in text


# The command


def written(folder: Path, document: Any) -> Path:
    """A report folder with that report.json."""
    folder.mkdir()
    (folder / "report.json").write_text(
        document if isinstance(document, str) else json.dumps(document)
    )
    return folder


def test_report_makes_the_page_anew(
    command: Command, tmp_path: Path, document: dict[str, Any]
) -> None:
    written(tmp_path / "there", document)
    ended = command("report", "there")
    assert (ended.code, ended.out, ended.err) == (0, "there/report.html\n", "")
    assert (tmp_path / "there/report.html").read_text() == page.render(document)


def test_report_of_what_is_none(command: Command, tmp_path: Path, document: dict[str, Any]) -> None:
    def without(*path: Any) -> dict[str, Any]:
        changed = copy.deepcopy(document)
        inner: Any = changed
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return changed

    deep = "[" * 200_000
    cases: dict[str, tuple[Any, str]] = {
        "empty": ("", "not JSON"),
        "deep": (deep, "not JSON"),
        "list": ([], "it must be an object"),
        "object": ({}, "schema is missing"),
        "name": (without("checks", 1, "name"), "checks[1].name is missing"),
        "pasid": (without("checks", 1, "attempts", 0, "pasid"), "attempts[0].pasid is missing"),
        "time": ({**document, "phases": [{"name": "x", "seconds": 1e999}]}, "must be seconds"),
        "type": ({**document, "checks": [{"name": 3}]}, "checks[0].name must be"),
        "schema": ({**document, "schema": 2}, "schema 2"),
    }
    for name, (text, said) in cases.items():
        with pytest.raises(Exception, match=re.escape(said)):
            load(written(tmp_path / name, text))
    for arguments in (["nonesuch"], ["empty"], ["list"], ["/proc/self"]):
        ended = command("report", *arguments)
        assert ended.code == 2
        assert len(ended.err.strip().splitlines()) == 1 and "report.json" in ended.err
    assert command("report").code == 2


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Browser:
    """Headless Chromium, which sends nothing anywhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, url: Path, *arguments: str) -> str:
        """Open a page; returns what the browser wrote on its standard output."""
        assert CHROMIUM is not None
        return subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking", "--disable-sync"),
                *("--disable-component-update", "--hide-scrollbars"),
                f"--user-data-dir={self.folder / 'profile'}",
                "--window-size=1200,1000",
                *arguments,
                url.as_uri(),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=True,
        ).stdout


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    """The browser; where CI runs, there must be one."""
    if CHROMIUM is None:
        assert os.environ.get("CI") != "true", "no chromium"
        pytest.skip("no chromium on this machine")
    return Browser(tmp_path)


#: Runs in the test's copy of the page only: what the browser made of it.
PROBE = """<script>
const box = each => each.getBoundingClientRect(), style = each => getComputedStyle(each);
const marks = [...document.querySelectorAll('.matrix .mark')];
top.document.title = JSON.stringify({
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
  paper: style(document.documentElement).backgroundColor,
  ink: style(document.documentElement).color,
  marks: marks.map(each => [each.classList[1], box(each).width, style(each).backgroundColor,
    box(each.querySelector('use')).height]),
  bars: [...document.querySelectorAll('.bar')].map(each => [box(each).left, box(each).width]),
  hidden: [...document.querySelectorAll('section, pre, td, dd')].filter(
    each => box(each).height == 0).length,
});
</script>"""


def probed(browser: Browser, text: str, *arguments: str, width: int = 1200) -> dict[str, Any]:
    """What PROBE says of a page in a window of that width."""
    path = browser.folder / "probe.html"
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert bare != text
    inner = html.escape(bare.replace("</body>", PROBE + "</body>"))
    # Chromium's own windows are 500 wide at least.
    path.write_text(
        f'<title></title><meta name="color-scheme" content="light dark">'
        f'<iframe srcdoc="{inner}" style="width:{width}px;height:900px;border:0"></iframe>'
    )
    title = re.search(r"<title>(.*?)</title>", browser.open(path, "--dump-dom", *arguments))
    assert title is not None
    found: dict[str, Any] = json.loads(title[1])
    return found


def test_a_browser_shows_it(browser: Browser, document: dict[str, Any]) -> None:
    document["phases"] = [
        {"name": "boot", "seconds": 3.0, "start": 0.0},
        {"name": "scenario", "seconds": 1.0, "start": 3.0},
    ]
    text = page.render(document)
    light = probed(browser, text)
    assert light["overflow"] == 0 and light["hidden"] == 0
    outcomes = {name: colour for name, _, colour, _ in light["marks"]}
    assert set(outcomes) == set(picture.OUTCOMES)
    assert len({outcomes[name] for name in ("allowed", "refused", "faulted", "leaked")}) == 4
    assert all(width > 15 and drawn > 0 for _, width, _, drawn in light["marks"])
    (left, width), (next_left, next_width) = light["bars"]
    assert left + width == pytest.approx(next_left, abs=1)
    assert width == pytest.approx(3 * next_width, rel=0.02)

    dark = probed(browser, text, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], light["ink"]) != (dark["paper"], dark["ink"])
    assert sum(map(int, re.findall(r"\d+", dark["paper"]))) < 150

    narrow = probed(browser, text, width=360)
    assert narrow["overflow"] <= 0 and narrow["width"] == 360


def test_a_browser_finds_nothing_in_hostile_text(
    browser: Browser, document: dict[str, Any]
) -> None:
    path = browser.folder / "hostile.html"
    path.write_text(page.render(each_string(document, lambda text: f"{text}{HOSTILE}")))
    dom = browser.open(path, "--dump-dom")
    found = Structure(dom)
    assert not {"script", "img"} & set(found.tags) and found.tags["style"] == 1
    assert "document.title" in re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]  # type: ignore[index]
    path.write_text(page.render(each_string(document, lambda text: "W" * 5000)))
    assert probed(browser, path.read_text(), width=360)["overflow"] <= 0


def test_it_prints_and_can_be_looked_at(browser: Browser, document: dict[str, Any]) -> None:
    path = browser.folder / "report.html"
    path.write_text(page.render(document))
    browser.open(path, f"--screenshot={browser.folder / 'page.png'}")
    assert (browser.folder / "page.png").read_bytes().startswith(b"\x89PNG")
    browser.open(path, f"--print-to-pdf={browser.folder / 'page.pdf'}")
    pdf = (browser.folder / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 4
