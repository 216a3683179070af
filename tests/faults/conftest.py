"""Faults that are injected into the real thing, counted, and listed in a table (`make faults`).

A test here takes the fixture ``injected`` and reports each injection with what it did. None may lose what was promised
to be kept, and none may give a wrong number without a word.
"""

from collections import defaultdict
from pathlib import Path

import pytest

_PROPERTY = "injections"
_HERE = Path(__file__).parent
_COUNTS = defaultdict(lambda: {"injected": 0, "lost": 0, "wrong": 0, "message": ""})


class Injections:
    """What was injected in one test, and what became of it."""

    def __init__(self):
        self.reported = []

    def __call__(self, fault, *, n=1, lost=0, wrong=0, message="", what=""):
        """Report n injections.

        Args:
            fault: The kind of fault, as the table names it.
            n: How many.
            lost: In how many of them something was lost that had to be kept.
            wrong: How many gave a wrong result without saying so.
            message: What the user read, for example; empty where nothing had to be said.
            what: Which one it was, for the failure's message.
        """
        self.reported.append(
            {"fault": fault, "n": n, "lost": lost, "wrong": wrong, "message": message.strip(), "what": what}
        )


@pytest.fixture
def injected(request):
    injections = Injections()
    yield injections
    request.node.user_properties.append((_PROPERTY, injections.reported))
    bad = [report for report in injections.reported if report["lost"] or report["wrong"]]
    assert not bad, "\n".join(map(str, bad))


def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


def pytest_runtest_logreport(report):
    if report.when != "teardown":
        return
    for name, reported in report.user_properties:
        for one in reported if name == _PROPERTY else ():
            counts = _COUNTS[one["fault"]]
            counts["injected"] += one["n"]
            counts["lost"] += one["lost"]
            counts["wrong"] += one["wrong"]
            counts["message"] = counts["message"] or one["message"]


def pytest_terminal_summary(terminalreporter):
    if not _COUNTS:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| fault | injected | lost | silently wrong | message |")
    terminalreporter.write_line("| --- | ---: | ---: | ---: | --- |")
    for fault, c in sorted(_COUNTS.items()):
        message = " ".join(c["message"].split()).replace("|", "\\|")
        terminalreporter.write_line(f"| {fault} | {c['injected']} | {c['lost']} | {c['wrong']} | {message} |")
    totals = (sum(c[key] for c in _COUNTS.values()) for key in ("injected", "lost", "wrong"))
    terminalreporter.write_line("| all | {} | {} | {} | |".format(*totals))
