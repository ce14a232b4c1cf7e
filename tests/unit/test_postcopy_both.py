"""Both ends of a postcopy are mig's: a guest runs on while its memory follows it."""

from __future__ import annotations

import threading

import pytest
from unit.boxes import FOREVER, error_of

import mig
from mig.errors import ChannelError

SIZE = 8 << 20


class Ends:
    """A process guest that runs, and an empty one that waits for it."""

    def __init__(self, made, folder, capabilities=("postcopy-ram",)):
        self.made, self.folder = made, folder
        self.mine = mig.ProcessGuest(SIZE, workers=2, rate=0, working_set=0.5)
        self.other = mig.ProcessGuest(SIZE)
        self.mine.start()
        self.incoming = made.incoming(self.other, capabilities=capabilities)
        self.incoming.listen(f"unix:{folder / 'in'}")
        self.outgoing = made.outgoing(self.mine, capabilities={"postcopy-ram"})

    def reach(self, migration, *statuses) -> None:
        step = threading.Event()
        for _ in range(2000):
            if migration.status in statuses:
                return
            step.wait(0.005)
        raise AssertionError(migration.status)

    def check(self) -> None:
        assert self.outgoing.wait(FOREVER)
        assert self.incoming.wait(FOREVER)
        assert self.other.running
        assert not self.mine.running
        writes = self.other.counters().writes
        while self.other.counters().writes < writes + 100:
            pass
        report = self.other.verify()
        assert report.ok, report

    def close(self) -> None:
        self.mine.close()
        self.other.close()


@pytest.fixture
def ends(made, tmp_path):
    ends = Ends(made, tmp_path)
    yield ends
    ends.close()


def test_a_guest_runs_on_while_its_memory_follows(ends):
    # or all of it would be there before it is touched
    ends.outgoing.background = False
    ends.outgoing.start_postcopy()
    ends.outgoing.start(ends.incoming.uri)
    step = threading.Event()
    while ends.other.postcopy_times().requests < 5:
        step.wait(0.001)
    ends.outgoing.background = True
    ends.check()


def test_a_break_in_the_middle_is_mended(ends, tmp_path):
    ends.outgoing.background = False
    ends.outgoing.start_postcopy()
    ends.outgoing.start(ends.incoming.uri)
    ends.reach(ends.incoming, "postcopy-active")
    for number in range(3):
        before = ends.other.postcopy_times().requests
        step = threading.Event()
        while ends.other.postcopy_times().requests < before + 5:
            step.wait(0.001)
        ends.outgoing.pause()
        ends.reach(ends.outgoing, "postcopy-paused")
        ends.reach(ends.incoming, "postcopy-paused")
        ends.incoming.recover(f"unix:{tmp_path / f'again{number}'}")
        ends.outgoing.recover(ends.incoming.uri)
        ends.reach(ends.outgoing, "postcopy-active")
        ends.reach(ends.incoming, "postcopy-active")
    ends.outgoing.background = True
    ends.check()


def test_a_file_is_the_destination(made, tmp_path):
    capture = mig.StreamCapture(tmp_path / "vm.mig")
    incoming = made.incoming(capture, capabilities={"postcopy-ram"})
    incoming.listen(f"unix:{tmp_path / 'in'}")
    with mig.ProcessGuest(SIZE, workers=2) as mine:
        mine.start()
        outgoing = made.outgoing(mine, capabilities={"postcopy-ram"})
        outgoing.start_postcopy()
        outgoing.start(incoming.uri)
        assert outgoing.wait(FOREVER)
        assert incoming.wait(FOREVER)
    with mig.open_image(tmp_path / "vm.mig") as image, mig.ProcessGuest(SIZE) as other:
        assert [block.missing for block in image.blocks] == [0, 0]
        again = made.incoming(other)
        again.listen(f"unix:{tmp_path / 'out'}")
        made.outgoing(image).start(again.uri)
        assert again.wait(FOREVER)
        assert other.verify().ok


def test_a_destination_without_the_capability_fails_the_source(made, tmp_path):
    with mig.ProcessGuest(SIZE) as other, mig.ProcessGuest(SIZE) as mine:
        mine.start()
        incoming = made.incoming(other)
        incoming.listen(f"unix:{tmp_path / 'in'}")
        outgoing = made.outgoing(mine, capabilities={"postcopy-ram"})
        outgoing.start(incoming.uri)
        assert isinstance(error_of(outgoing), ChannelError)
        assert mine.running
