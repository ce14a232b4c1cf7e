"""The page of benchmarks' results: whole ones, and what takes the place of what on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENDS = ("source", "destination")
QEMU = "QEMU 10.0.2"

Json = dict[str, Any]


def bench(name: str, info: Json, median: float = 0.5, group: str | None = None) -> Json:
    stats = {"median": median, "rounds": 5}
    return {"name": f"test_{name}", "group": group, "stats": stats, "extra_info": info}


def result(*benchmarks: Json, date: str = "2026-11-21", **machine: Any) -> Json:
    known = {"cpu": "CPU", "cpus": 2, "kernel": "6.1", "kernels": "avx2", "smoke": False}
    return {
        "benchmarks": list(benchmarks),
        "datetime": f"{date}T12:00:00",
        "machine_info": {"mig": known | machine},
    }


def live(rate: int, downtime: float = 0.1) -> Json:
    info = {"rate": rate << 20, "log": "tracked", "memory": 1 << 30, "throughput": 2e9}
    return bench("downtime", info | {"downtime": downtime, "worst": 0.2, "limit": 0.3})


def snapshot(rate: int, faults: float = 7) -> Json:
    said = {"pause": 0.001, "faults": faults, "during": 1e8, "alone": 2e8, "stand still": 0.05}
    info = {"rate": rate << 20, "memory": 1 << 30, "file system": "tmpfs", "longest_pause": 0.002}
    return bench("snapshot", info | {"snapshot": said | {"setup": 0.02}})


def captured(command: str, **peers: float) -> Json:
    info = {"command": command, "holds": "pages", "file system": "ext4", "nbytes": 1 << 30}
    info |= {f"seconds {peer}": seconds for peer, seconds in peers.items()}
    info |= {f"ratio {peer}": seconds / 0.5 for peer, seconds in peers.items()}
    return bench("captured", info)


def kernel(name: str, group: str, median: float = 1e-6, peer: str = "plain C") -> Json:
    info = {"nbytes": 0, "count": 1000, "unit": "page"}
    info |= {f"seconds {peer}": 2 * median, f"ratio {peer}": 2.0}
    return bench(name, info, median, group)


def usage(who: str) -> Json:
    ends = {f"cpu {who} {end} {mode}": 0.1 for end in ENDS for mode in ("user", "system")}
    return {f"cpu {who} machine": 0.5, **ends}


def legs(settings: str, total: float, disk: float = 2e9) -> Json:
    """mig to QEMU, and QEMU to a file of mig's."""
    info = {"settings": settings, "transport": "unix", "mib": 1024, "disk": disk, "beside": QEMU}
    info["legs"] = {"mig": "mig to QEMU", "into file": "QEMU to mig, mapped-ram file"}
    for who in ("mig", "into file", QEMU):
        info |= {f"total {who}": total, f"seconds {who}": total, **usage(who)}
    return bench("mig_and_qemu", info)


def migration(name: str, mib: int = 4096) -> Json:
    info = {"mib": mib, "folder": "tmpfs", f"seconds {QEMU}": 1.0}
    info |= {f"ratio total {QEMU}": 2.0, f"ratio throughput {QEMU}": 2.0}
    for who in ("mig", QEMU):
        info |= {f"total {who}": 1.0, f"throughput {who}": 1e9, **usage(who)}
    return bench(name, info)


class Reporter:
    """Runs the report; `page` is what it updates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.page = folder / "PAGE.md"

    def run(self, *results: Json, update: bool) -> subprocess.CompletedProcess[str]:
        names = []
        for i, given in enumerate(results):
            names.append(str(self._folder / f"{i}.json"))
            Path(names[-1]).write_text(json.dumps(given))
        options = ["--update", str(self.page)] if update else []
        return subprocess.run(
            [sys.executable, str(BENCHMARKS / "report.py"), *names, *options],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    def whole(self, *results: Json) -> str:
        ran = self.run(*results, update=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def update(self, *results: Json) -> str:
        """Return what is said of the update."""
        ran = self.run(*results, update=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == ""
        return ran.stderr

    def text(self) -> str:
        return self.page.read_text(encoding="utf-8")

    def lines(self) -> list[str]:
        return self.text().splitlines()


@pytest.fixture
def reporter(tmp_path: Path) -> Reporter:
    return Reporter(tmp_path)


def titles(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("## ", "### "))]


def notes(text: str) -> list[str]:
    """The lines before the sections."""
    return [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("- ")]


def row(text: str, *cells: str) -> str:
    """The one row that begins with these cells."""
    (found,) = [x for x in text.splitlines() if x.startswith(f"| {' | '.join(cells)} |")]
    return found


EVERYTHING = [
    kernel("zero", "Zero pages"),
    captured("analyze", Python=2.0),
    snapshot(50),
    live(50),
    legs("plain", 0.5),
    migration("idle_guest[10.0]"),
    migration("send"),
]


def test_sections_have_an_order(reporter):
    text = reporter.whole(result(*EVERYTHING))
    assert titles(text) == [
        "## Migrations",
        "## An idle guest (4 GiB)",
        "## Channels and codecs",
        "## Running guests",
        "## Background snapshots",
        "## Captured files",
        "## Kernels",
        "### Zero pages",
    ]
    assert notes(text) == [
        "- CPU, 2 CPUs, Linux 6.1",
        "- QEMU 10.0.2",
        "- 2026-11-21; machines drift: only ratios within a run mean anything",
        "- the kernels that mig chooses here: `avx2`",
        "- libraries that the kernels are measured beside: none (plain C only)",
    ]
    assert text.endswith("|\n")


def test_snapshots(reporter):
    text = reporter.whole(result(snapshot(50), snapshot(0)))
    assert row(text, "50 MiB/s", "tmpfs") == (
        "| 50 MiB/s | tmpfs | 1024 MiB | 500 ms | 20 ms | 7 | 200 MB/s | 100 MB/s | **0.50** "
        "| 1 ms | 2 ms | 50 ms | **50** |"
    )
    assert row(text, "no limit", "tmpfs")


def test_captured_files(reporter):
    text = reporter.whole(result(captured("analyze", Python=2.0), captured("diff", cmp=1.0)))
    assert "| pages | ext4 | 1024 MiB | 500 ms | 2.15 |" in row(text, "`analyze`")
    assert row(text, "`analyze`").endswith("| 2 s |  | **4.0** |  |")
    assert row(text, "`diff`").endswith("|  | 1 s |  | **2.0** |")


def test_a_smoke_run_says_so(reporter):
    (machine, *_) = notes(reporter.whole(result(live(0), smoke=True)))
    assert machine == "- CPU, 2 CPUs, Linux 6.1, **smoke run, too short to mean anything**"


# ---- on a page -------------------------------------------------------------------------------


def test_nothing_measured_changes_nothing(reporter):
    given = (BENCHMARKS / "RESULTS.md").read_bytes()
    reporter.page.write_bytes(given)
    assert reporter.update(result(date="2030-01-01")) == ""
    assert reporter.page.read_bytes() == given


def test_the_same_again_changes_nothing(reporter):
    reporter.update(result(*EVERYTHING))
    text = reporter.text()
    assert text == reporter.whole(result(*EVERYTHING))
    reporter.update(result(*EVERYTHING))
    assert reporter.text() == text


def test_rows_take_the_place_of_those_with_the_same_settings(reporter):
    reporter.update(result(live(50), legs("plain", 0.5), legs("multifd 2", 0.5)))
    before = reporter.lines()
    said = reporter.update(result(legs("plain", 0.25, disk=3e9)))
    after = reporter.lines()
    assert said == "Channels and codecs: rows or tables that were not measured stay (2)\n"
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert [a.split(" | ")[:2] for a, _ in changed] == [
        ["| plain, unix", "mig to QEMU"],
        ["| plain, unix", "QEMU to mig, mapped-ram file (2.00 GB/s)"],
    ]
    assert all("| 250 ms | 250 ms |" in b for _, b in changed)
    assert "(3.00 GB/s)" in changed[1][1]


def test_new_rows_follow_what_they_follow_in_the_results(reporter):
    reporter.update(result(live(0), live(200)))
    reporter.update(result(live(0), live(50)))
    reporter.update(result(live(800)))
    rates = [line.split()[1] for line in reporter.lines() if "MiB/s |" in line]
    assert rates == ["0", "50", "200", "800"]


def test_a_new_section_goes_where_a_whole_page_has_it(reporter):
    reporter.update(result(live(0), kernel("zero", "Zero pages")))
    before = reporter.text()
    assert reporter.update(result(snapshot(50))) == "Background snapshots: added\n"
    after = reporter.text()
    at = after.index("\n\n## Background snapshots")
    end = after.index("\n\n## Kernels")
    assert after[:at] + after[end:] == before
    reporter.update(result(migration("idle_guest", 8192)), result(migration("idle_guest")))
    assert titles(reporter.text())[:3] == [
        "## An idle guest (8 GiB)",
        "## An idle guest (4 GiB)",
        "## Running guests",
    ]


def test_what_somebody_wrote_stays(reporter):
    reporter.update(result(live(0), kernel("zero", "Zero pages")))
    note, section = "- measured by night", "\n\n## Mine\n\nWords.\n\n\n## Running guests"
    text = reporter.text().replace("\n\n## Running guests", f"\n{note}{section}")
    reporter.page.write_text(text, encoding="utf-8")
    reporter.update(result(live(0, downtime=0.25)))
    old = row(text, "0 MiB/s")
    new = old.replace("100 ms", "250 ms").replace("0.33", "0.83")
    assert reporter.text() == text.replace(old, new)


def test_kernels_are_replaced_row_by_row_and_table_by_table(reporter):
    reporter.update(result(kernel("a", "A"), kernel("b", "B"), kernel("b2", "B"), kernel("d", "D")))
    before = reporter.text()
    changed = [kernel("b", "B", 3e-6), kernel("c", "C")]
    assert "stay (3)" in reporter.update(result(*changed))
    text = reporter.text()
    assert titles(text) == ["## Kernels", "### A", "### B", "### C", "### D"]
    assert "| `b` | 3 ns a page | 2.00 |" in text
    for name in ("`a`", "`b2`", "`d`"):
        assert row(text, name) == row(before, name)


def test_other_columns_replace_the_table_and_say_what_is_gone(reporter):
    reporter.update(result(kernel("a", "A"), kernel("a2", "A"), kernel("b", "B")))
    given = result(kernel("a", "A", peer="QEMU 10.0"), library="QEMU 10.0", scalar="Q scalar")
    said = reporter.update(given)
    assert "  its columns have changed\n" in said
    assert "  rows that were not measured are gone with the old columns:\n  | `a2`" in said
    text = reporter.text()
    assert "| `a` | 1 ns a page | 2.00 |" in text
    assert "`a2`" not in text
    assert "| `b` |" in text
    # the other library is in no table
    assert notes(text)[-1] == "- libraries that the kernels are measured beside: `QEMU 10.0`"


def test_another_text_over_rows_that_stay_is_said(reporter):
    reporter.update(result(live(0), live(50)))
    text = reporter.text()
    reporter.page.write_text(text.replace("Threads that write", "Somebody writes"), "utf-8")
    assert "does it hold for what stays?" in reporter.update(result(live(0)))
    assert reporter.text() == text


# ---- where, when -----------------------------------------------------------------------------


def test_dates_add_up_until_all_is_new(reporter):
    def dates() -> str:
        return notes(reporter.text())[1].removeprefix("- ").partition(";")[0]

    reporter.update(result(live(0), snapshot(50)))
    reporter.update(result(live(0), date="2026-11-22"))
    assert dates() == "2026-11-21 and 22"
    reporter.update(result(live(0), date="2026-12-01"), result(live(50), date="2026-11-30"))
    assert dates() == "2026-11-21, 22, 30 and 2026-12-01"
    reporter.update(result(live(0), date="2027-01-05"))
    assert dates() == "2026-11-21, 22, 30, 2026-12-01 and 2027-01-05"
    reporter.update(result(live(0), live(50), snapshot(50), date="2027-01-06"))
    assert dates() == "2027-01-06"


def test_another_machine_is_named_with_what_it_measured(reporter):
    reporter.update(result(live(0), live(50), snapshot(50), kernel("a", "A")))
    reporter.update(result(live(0), snapshot(50), kernel("a", "A"), cpus=8, kernels="sse2"))
    first, other, _, kernels, *_ = notes(reporter.text())
    assert first == "- CPU, 2 CPUs, Linux 6.1"
    assert other == (
        "- CPU, 8 CPUs, Linux 6.1: some of Running guests, Background snapshots, Kernels"
    )
    assert kernels == "- the kernels that mig chooses on CPU, 8 CPUs, Linux 6.1: `sse2`"
    reporter.update(result(snapshot(50), kernel("b", "B")))
    first, other, _, *kernels, _ = notes(reporter.text())
    assert other == "- CPU, 8 CPUs, Linux 6.1: some of Running guests, some of Kernels"
    assert sorted(kernels) == [
        "- the kernels that mig chooses here: `avx2`",
        "- the kernels that mig chooses on CPU, 8 CPUs, Linux 6.1: `sse2`",
    ]
    reporter.update(result(live(0), live(50), snapshot(50), kernel("a", "A"), kernel("b", "B")))
    assert notes(reporter.text())[:2] == [
        "- CPU, 2 CPUs, Linux 6.1",
        "- 2026-11-21; machines drift: only ratios within a run mean anything",
    ]


def test_a_machine_with_nothing_left_is_gone(reporter):
    reporter.update(result(live(0)), result(snapshot(50), cpus=8))
    assert notes(reporter.text())[1] == "- CPU, 8 CPUs, Linux 6.1: Background snapshots"
    reporter.update(result(live(0), cpus=8))
    assert notes(reporter.text())[0] == "- CPU, 8 CPUs, Linux 6.1"
    assert "2 CPUs" not in reporter.text()


def test_two_sections_of_one_name_are_refused(reporter):
    reporter.page.write_text("# Benchmarks\n\n## A\n\nx\n\n## A\n\ny\n")
    ran = reporter.run(result(live(0)), update=True)
    assert ran.returncode == 1
    assert "two headings '## ...' with the same words" in ran.stderr
    assert reporter.text() == "# Benchmarks\n\n## A\n\nx\n\n## A\n\ny\n"
