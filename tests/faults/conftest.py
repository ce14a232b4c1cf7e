"""After every test: no thread and no descriptor of a migration is left."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from faults import streams
from unit.postcopies import Lab, closed_lab

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note failures: their tracebacks keep objects, and so descriptors, alive."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose migrations leave threads or descriptors behind."""
    before = streams.open_fds()
    yield
    if request.node.stash.get(_FAILED, False):
        return
    for thread in streams.mig_threads():
        thread.join(10)
    assert streams.mig_threads() == []
    if streams.open_fds().keys() - before.keys():
        gc.collect()
    after = streams.open_fds()
    assert {fd: what for fd, what in after.items() if fd not in before} == {}


@pytest.fixture(scope="session")
def stream() -> streams.Pieces:
    return streams.sample()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that a failed capture must leave as empty as it was."""
    path = tmp_path / "captures"
    path.mkdir()
    return path


@pytest.fixture(params=["plain", "preempt"])
def postcopies(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """Postcopies by hand, with a connection for urgent pages and without."""
    with closed_lab(tmp_path, {"postcopy-preempt"} if request.param == "preempt" else ()) as lab:
        yield lab
