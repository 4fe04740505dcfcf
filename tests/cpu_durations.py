"""Processor seconds per test and per file, for `--cpu-durations`.

Wall-clock times depend on what else the machine does. Processor time hardly does.
"""

import collections
import resource

import pytest

PROPERTY = "processor seconds"


def _processor_seconds():
    """Of this process and of the processes that it has started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class CpuDurations:
    """Reads the clock before and after each test. Workers send what they read with the report."""

    def __init__(self, longest):
        self.longest = longest
        self.start = 0.0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self):
        self.start = _processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = _processor_seconds()
        report.user_properties = [*report.user_properties, (PROPERTY, now - self.start)]
        self.start = now
        return report

    def pytest_terminal_summary(self, terminalreporter):
        tests, files = collections.Counter(), collections.Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                for name, value in getattr(report, "user_properties", ()):
                    if name == PROPERTY:
                        tests[report.nodeid] += value
                        files[report.nodeid.partition("::")[0]] += value
        terminalreporter.section(f"{tests.total():.0f} processor seconds, collection aside")
        for counter in (files, tests):
            for nodeid, seconds in counter.most_common(self.longest):
                terminalreporter.write_line(f"{seconds:8.2f}  {nodeid}")
            terminalreporter.write_line("")
