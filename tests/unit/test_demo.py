"""`mig demo` and the examples, as their users run them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import mig
from mig.cli import main
from mig.cli.demo import _Display, _throttle
from mig.demo import guests, job
from mig.demo.job import Demo, DemoError, DemoReport, check
from mig.errors import DirtyLogError, KvmUnavailableError
from mig.guest.kvm import probe

ROOT = Path(__file__).parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *command], capture_output=True, text=True, timeout=100, check=False
    )


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "mig", "demo", "--memory", "16M", *arguments)


def what_kvm_lacks() -> str | None:
    try:
        probe()
    except KvmUnavailableError as error:
        return str(error)
    return None


@pytest.mark.parametrize("log", [(), ("--dirty-log", "marked", "--patient")])
def test_a_running_guest_moves_and_nothing_of_it_is_corrupt(log):
    done = demo("--json", "--dirty-rate", "20M", *log)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["status"] == "completed"
    assert report["memory-nbytes"] == 16 << 20
    assert report["migration"]["status"] == "completed"
    assert report["migration"]["ram"]["dirty-sync-count"] >= 3
    assert report["source"]["ok"]
    assert report["destination"]["ok"]
    assert report["destination"]["npages"] == 4096
    assert report["destination"]["writes"] > report["source"]["writes"] > 0
    assert 0 < report["guest-downtime"] < 10
    if log:
        assert report["dirty-log"] == "marked"


def test_a_virtual_machine_moves():
    done = demo("--guest", "kvm", "--workers", "2", "--json")
    missing = what_kvm_lacks()
    if missing is not None:
        assert done.returncode == 1
        assert missing in done.stderr
        return
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["destination"]["ok"]
    assert report["destination"]["npages"] == 4096
    assert report["destination"]["rest"] == report["source"]["rest"] is not None
    assert report["destination"]["writes"] > report["source"]["writes"] > 0


@pytest.mark.parametrize("guest", ["process", "kvm"])
def test_a_guest_runs_at_the_other_end_before_its_memory_is_there(guest):
    # not all of it is there before it is touched
    slow = ("-p", "max-postcopy-bandwidth=16M")
    done = demo("--guest", guest, "--postcopy", "--workers", "2", "--json", *slow)
    missing = what_kvm_lacks() if guest == "kvm" else None
    if missing is not None:
        assert missing in done.stderr
        return
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["destination"]["ok"]
    assert report["destination"]["npages"] == 4096
    assert report["destination"]["writes"] > report["source"]["writes"] > 0
    postcopy = report["postcopy"]
    assert 0 < postcopy["time-to-run"] < 10
    assert postcopy["requests"] == report["migration"]["ram"]["postcopy-requests"] > 0
    assert postcopy["faults"] >= postcopy["requests"]
    assert 0 < postcopy["p50"] <= postcopy["p99"]
    assert len(postcopy["vcpus"]) == 2
    assert report["migration"]["downtime"] <= report["migration"]["total-time"]


def test_the_report_of_a_postcopy_is_for_people():
    done = demo("--postcopy", "-c", "return-path=off")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0] for line in done.stdout.splitlines()}
    assert lines >= {"guest", "migration", "pages", "downtime", "postcopy", "verified"}
    assert "it ran at the destination after" in done.stdout


def test_a_destination_that_dies_in_postcopy_takes_the_guest_with_it(monkeypatch):
    made = []

    class Noted(job._Destination):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(job, "_Destination", Noted)
    arguments = ["demo", "--memory", "16M", "--postcopy", "-p", "max-postcopy-bandwidth=1M"]
    monkeypatch.setattr(_Display, "show", lambda *_: made[0].kill())
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert "postcopy was given up" in done.output


def test_a_machine_without_kvm_is_told_what_to_do(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise KvmUnavailableError("opening /dev/kvm: No such file or directory")

    monkeypatch.setattr(guests, "_Kvm", refuse)
    done = CliRunner().invoke(main, ["demo", "--guest", "kvm", "--memory", "16M"])
    assert done.exit_code == 1
    assert "opening /dev/kvm: No such file or directory (--guest process" in done.output


@pytest.mark.parametrize(
    "options",
    [
        ("-c", "pause-before-switchover"),
        ("-c", "switchover-ack"),
        ("-c", "multifd", "-p", "multifd-channels=3", "-p", "multifd-compression=zstd"),
        ("-p", "mode=cpr-reboot"),
    ],
    ids=lambda words: words[-1],
)
def test_it_moves_with_every_capability_that_can_be(options):
    done = demo("--json", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["destination"]["ok"]


def test_a_destination_that_fails_says_why(monkeypatch, capfd):
    monkeypatch.setattr(Demo, "_how", property(lambda _: {}, lambda *_: None), raising=False)
    done = CliRunner().invoke(main, ["demo", "--memory", "16M", "-c", "multifd"])
    assert done.exit_code == 1
    # whichever it sees first: a channel, or what the main stream has of channels
    reasons = "the source opened multifd channels|RAM record MULTIFD_FLUSH is not supported"
    assert re.search(f"the destination says: ({reasons})", done.output)


def test_memory_that_the_guest_does_not_write_is_compared():
    ends = {"ok": True, "corrupt": [], "ticks": 1, "rest": "a"}
    report = DemoReport(None, None, ends, {**ends, "ticks": 2, "rest": "b"})
    with pytest.raises(DemoError, match="does not write"):
        check(report)


def test_the_display_tells_either_kind_of_throttle():
    info = mig.OutgoingMigration(mig.MemoryGuest("box", mig.GuestMemory())).query()
    assert _throttle(info) == "0 %"
    info = replace(info, cpu_throttle_percentage=30)
    assert _throttle(info) == "30 %"
    info = replace(info, dirty_limit_throttle_time_per_round=0.25)
    assert _throttle(info).startswith("250.0 ms")


def test_the_report_is_for_people():
    done = demo("--pattern", "words", "--workers", "2", "-c", "return-path=off")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0] for line in done.stdout.splitlines()}
    assert lines == {"guest", "migration", "pages", "downtime", "verified"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dirty-rate", "quick"), "no size"),
        (("-p", "max-bandwidth=much"), "max-bandwidth"),
        (("-c", "x-colo"), "x-colo"),
        (("--workers", "0"), "workers"),
    ],
)
def test_wrong_usage_is_one_word_about_it(arguments, message):
    done = demo(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_where_the_kernel_cannot_the_guest_marks_its_writes(monkeypatch):
    def refuse(memory: object) -> None:
        raise DirtyLogError("no userfaultfd")

    monkeypatch.setattr(guests, "WriteTracker", refuse)
    assert guests.best_log(None) == ("marked", "no userfaultfd")
    assert guests.best_log("marked") == ("marked", None)
    with pytest.raises(DirtyLogError):
        guests.best_log("tracked")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_does_what_it_says(path):
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nothing is corrupt"
