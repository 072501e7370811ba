# SPDX-License-Identifier: GPL-2.0-or-later
"""report.html: a report's document as a page that people look at."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from qemu_ioasid.attempts import Matrix
from qemu_ioasid.markup import Child, Markup, serialized
from qemu_ioasid.picture import holder, isolation, mark, seconds, symbols, timeline

Document = dict[str, Any]

#: All the text of a page, in characters; a run of the default scenario takes a twentieth.
BUDGET = 400_000
#: The most checks there are, and the failures told in full.
CHECKS, FAILURES = 500, 20
#: The most attempts told of one check.
ATTEMPTS = 20
#: The symbol of each verdict.
VERDICT_SYMBOLS = {"pass": "allowed", "fail": "failed", "error": "unanswered", "skip": "refused"}


def render(document: Document) -> str:
    """The page of a report.json's document, as `report.load` has it."""
    return serialized(_Page(document).root())


def whole(e: Markup, title: str, *body: Child) -> Element:
    """A page of *body*, which may run nothing and load nothing."""
    style = Element("style")
    style.text = Path(__file__).with_name("page.css").read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return e(
        "html",
        e(
            "head",
            e("meta", charset="utf-8"),
            e("meta", http_equiv="Content-Security-Policy", content=policy),
            e("meta", name="viewport", content="width=device-width, initial-scale=1"),
            e("title", title),
            style,
        ),
        e("body", *body),
        lang="en",
    )


def _leaked(check: Document) -> bool:
    return any(attempt["outcome"] == "leaked" for attempt in check.get("attempts", []))


class _Page:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.checks = document["checks"][:CHECKS]
        #: The numbers of the checks that failed, those with a leak first.
        self.failed = sorted(
            (n for n, check in enumerate(self.checks) if check["verdict"] in ("fail", "error")),
            key=lambda n: not _leaked(self.checks[n]),
        )
        self.e = Markup(BUDGET)

    def root(self) -> Element:
        e, document = self.e, self.document
        picture, failures = isolation(e, Matrix(document)), self._failures()
        # The picture shows a leak best, and an excerpt why a run ended early.
        first = (failures, picture) if document["error"] else (picture, failures)
        return whole(
            e,
            f"{document['verdict']}: {document['scenario']}, qemu_ioasid",
            symbols(self.e),
            self._verdict(),
            *first,
            timeline(self.e, document),
            self._all_checks(),
            self._provenance(),
        )

    def _badge(self, verdict: str) -> Element:
        known = verdict if verdict in VERDICT_SYMBOLS else "skip"
        symbol = mark(self.e, VERDICT_SYMBOLS[known])
        return self.e("span", symbol, verdict, class_=f"badge {known}")

    # The verdict

    def _verdict(self) -> Element:
        e, document = self.e, self.document
        code = document["exit_code"]
        kind = {0: "good", 1: "bad", 5: "bad"}.get(code, "unknown")
        symbol = {"good": "allowed", "bad": "failed", "unknown": "unanswered"}[kind]
        verdict = document["verdict"]
        started = document.get("started", "").replace("T", " ").replace("Z", " UTC")
        return e(
            "header",
            e("p", " · ".join(filter(None, ["qemu_ioasid", document["scenario"], started]))),
            e("h1", mark(self.e, symbol), verdict[:1].upper() + verdict[1:], class_=kind),
            e("p", f"Exit code {code}. {self._sums()}"),
            e("p", document["error"]["message"], class_="cause") if document["error"] else None,
            e("ul", *(self._link(n) for n in self.failed[:FAILURES]), class_="jump"),
        )

    def _link(self, number: int) -> Element:
        e, check = self.e, self.checks[number]
        kind = "leaked" if _leaked(check) else VERDICT_SYMBOLS[check["verdict"]]
        return e("li", mark(e, kind), e("a", check["name"], href=f"#check-{number}"))

    def _sums(self) -> str:
        verdicts = Counter(check["verdict"] for check in self.document["checks"])
        outcomes = Counter(
            attempt["outcome"]
            for check in self.document["checks"]
            for attempt in check.get("attempts", [])
        )
        told = []
        for what, counted in (("check", verdicts), ("attempt", outcomes)):
            if counted:
                parts = ", ".join(f"{count} {name}" for name, count in counted.items())
                many = "s" * (counted.total() != 1)
                told.append(f"{counted.total()} {what}{many}: {parts}.")
        return " ".join(told) or "No check was made."

    # Failures

    def _failures(self) -> Element | None:
        e = self.e
        cards: list[Child] = []
        if self.document["error"]:
            cards.append(self._ended_early(self.document["error"]))
        cards += [self._failure(number) for number in self.failed[:FAILURES]]
        left_out = len(self.failed) - FAILURES
        if left_out > 0:
            cards.append(e("p", f"and {left_out} more, among all checks below"))
        return e("section", e("h2", "What went wrong"), *cards) if cards else None

    def _ended_early(self, error: dict[str, str]) -> Element:
        e = self.e
        last = self.document["checks"][-1:]
        step = [f"in the step “{error['phase']}”"] if error.get("phase") else []
        step += [f"the last check made was {check['name']}: {check['verdict']}" for check in last]
        return e(
            "article",
            e("h3", self._badge("error"), "The run ended early"),
            e("p", error["message"], class_="cause"),
            e("p", "; ".join(step) or "before the first step", class_="step"),
            e.block(error["evidence"]) if error["evidence"] else None,
            class_="failure",
        )

    def _failure(self, number: int) -> Element:
        e, check = self.e, self.checks[number]
        step = [f"in the step “{check['phase']}”"] if check.get("phase") else []
        if number:
            before = self.checks[number - 1]
            step.append(f"after {before['name']}: {before['verdict']}")
        return e(
            "article",
            e("h3", self._badge(check["verdict"]), check["name"]),
            e("p", ", ".join([*step, seconds(check["seconds"])]), class_="step"),
            e(
                "dl",
                *(
                    part
                    for key in ("tried", "answered", "witnesses")
                    for part in (e("dt", key), e("dd", check[key]))
                ),
            ),
            self._attempts(check),
            self._evidence(check["evidence"]),
            class_="failure",
            id=f"check-{number}",
        )

    def _evidence(self, text: str) -> Element | None:
        lines = text.strip().splitlines()
        why = self.document["error"]["evidence"] if self.document["error"] else ""
        if len(lines) > 1 and set(lines[1:]) <= set(why.splitlines()):
            return self.e("p", f"{lines[0]} as above, where the run ended", class_="step")
        if len(lines) > 1:
            return self.e.block(text)
        return self.e("p", text, class_="step") if lines else None

    def _attempts(self, check: Document) -> Element | None:
        e = self.e
        attempts = check.get("attempts", [])[:ATTEMPTS]
        if not attempts:
            return None
        names = ("device", "in the hands of", "PASID", "held by", "must be", "was", "")
        return e(
            "table",
            e("thead", e("tr", *(e("th", name, scope="col") for name in names))),
            e("tbody", *(e("tr", *self._attempt(attempt)) for attempt in attempts)),
            class_="attempts",
        )

    def _attempt(self, attempt: Document) -> list[Element]:
        e = self.e
        pasid = attempt["pasid"]
        return [
            e("td", attempt["device"]),
            e("td", attempt["by"]),
            e("td", "none" if pasid is None else str(pasid)),
            e("td", holder(attempt["owner"])),
            e("td", attempt["expected"]),
            e("td", attempt["answered"] or "not answered"),
            e("td", mark(self.e, attempt["outcome"]), attempt["outcome"], class_="outcome"),
        ]

    # All checks

    def _all_checks(self) -> Element | None:
        e = self.e
        if not self.checks:
            return None
        names = ("verdict", "check", "tried", "answered", "witnesses", "time")
        bodies = []
        for phase, group in groupby(self.checks, key=lambda check: str(check.get("phase", ""))):
            head = e("tr", e("th", phase, colspan="6", scope="rowgroup")) if phase else None
            bodies.append(e("tbody", head, *(self._check(check) for check in group)))
        left_out = len(self.document["checks"]) - len(self.checks)
        return e(
            "section",
            e("h2", "All checks"),
            e(
                "table",
                e("thead", e("tr", *(e("th", name, scope="col", class_=name) for name in names))),
                *bodies,
                class_="checks",
            ),
            e("p", f"{left_out} more are in report.json only.") if left_out else None,
        )

    def _check(self, check: Document) -> Element:
        e = self.e
        attempts = [
            e(
                "li",
                mark(self.e, attempt["outcome"]),
                f"{attempt['device']}, "
                + (
                    "no PASID"
                    if attempt["pasid"] is None
                    else f"PASID {attempt['pasid']} of {holder(attempt['owner'])}"
                )
                + f": {attempt['outcome']}",
            )
            for attempt in check.get("attempts", [])[:ATTEMPTS]
        ]
        more = len(check.get("attempts", [])) - len(attempts)
        attempts += [e("li", f"and {more} more")] * (more > 0)
        return e(
            "tr",
            e("td", self._badge(check["verdict"])),
            e("th", check["name"], scope="row"),
            e("td", check["tried"], e("ul", *attempts, class_="tried") if attempts else None),
            e("td", check["answered"]),
            e("td", check["witnesses"]),
            e("td", seconds(check["seconds"]), class_="number"),
            class_=check["verdict"] if check["verdict"] in VERDICT_SYMBOLS else "",
        )

    # Provenance

    def _provenance(self) -> Element:
        e, document = self.e, self.document
        why = document["accelerator_reason"]
        accelerator = document["accelerator"].upper() + (f"; why not KVM: {why}" if why else "")
        rows = {"accelerator": accelerator or "none was chosen"}
        rows |= {name.replace("_", " "): _flat(each) for name, each in document["versions"].items()}
        rows |= {f"vIOMMU of {vm['name']}": vm["viommu"] for vm in document.get("vms", [])}
        return e(
            "section",
            e("h2", "Provenance"),
            e(
                "dl",
                *(part for name, text in rows.items() for part in (e("dt", name), e("dd", text))),
                class_="provenance",
            ),
            e("h3", "Rig file"),
            e.block(document["rig"]),
            e(
                "p",
                "Beside this page: report.json and junit.xml with all of the above, and for every "
                "VM its console, what was said over QMP and with its agent, QEMU's command line "
                "and what QEMU wrote.",
            ),
        )


def _flat(value: Any) -> str:
    """What a version says, in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(each)}" for name, each in value.items())
    return value if isinstance(value, str) else json.dumps(value)
