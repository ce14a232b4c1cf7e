"""What happens to a postcopy without its owner: going over, recovering; and release-ram."""

from __future__ import annotations

import os
import threading

import pytest
from click.testing import CliRunner
from unit.boxes import FOREVER, NPAGES, PAGE, Box, error_of
from unit.far import until
from unit.postcopies import RAM, TOTAL, box, is_paused

import mig
from mig import AfterPasses, OutgoingMigration, Retry, Status, WhenStuck
from mig.cli import main
from mig.engine import Attempt
from mig.errors import ChannelError, MigError, OptionError, PeerError
from mig.events import StatusChanged

# ---- going over ------------------------------------------------------------------------------


def test_after_so_many_passes():
    assert [AfterPasses(2).goes_over(n, 100) for n in range(4)] == [False, False, True, True]
    assert AfterPasses(0).goes_over(0, 100)
    with pytest.raises(ValueError, match="-1"):
        AfterPasses(-1)


@pytest.mark.parametrize(
    ("remaining", "at"),
    [
        ([100, 50, 25, 12, 6], None),
        # a pass that does not help may be an exception, two in a row are none
        ([100, 50, 50, 25, 25, 12], None),
        ([100, 50, 50, 50], 3),
        ([100, 50, 60, 45], 3),
        ([100, 100, 100], 2),
    ],
)
def test_when_passes_do_not_help(remaining, at):
    policy = WhenStuck(factor=1.25, passes=2)
    assert not policy.goes_over(0, 1000)
    said = [policy.goes_over(n + 1, left) for n, left in enumerate(remaining)]
    assert said == [at is not None and n >= at for n in range(len(remaining))]


def test_when_stuck_wants_numbers_that_make_sense():
    for wrong in ({"factor": 1.0}, {"passes": 0}):
        with pytest.raises(ValueError, match="factor"):
            WhenStuck(**wrong)


class Busy(mig.SharedDirtyLog):
    """The log of a guest that has always written."""

    def sync(self, idstr, dirty):
        if idstr == RAM:
            for page in range(50):
                self.mark(RAM, page)
        return super().sync(idstr, dirty)


@pytest.mark.parametrize(("policy", "passes"), [(AfterPasses, 1), (AfterPasses, 4), (WhenStuck, 3)])
def test_a_guest_that_writes_too_much_goes_over_by_itself(postcopies, policy, passes):
    mine = Box(5, dirty=Busy({RAM: NPAGES, "vga.vram": 16}))
    far = postcopies.far()
    # no pass is ever small enough
    source = postcopies.source(
        mine.guest,
        at_once=False,
        postcopy=policy(passes) if policy is AfterPasses else policy(),
        parameters={"downtime-limit": 0},
    )
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert far.said("package")
    # and one more, when the guest was stopped
    assert source.query().ram.dirty_sync_count == passes + 2
    assert far.same_as(mine.memory)
    assert not far.twice


def test_a_guest_that_can_be_stopped_does_not_go_over(made, tmp_path):
    seen = []
    mine, other = Box(5, dirty=mig.SharedDirtyLog({RAM: NPAGES, "vga.vram": 16})), Box()
    incoming = made.incoming(other.guest, capabilities={"postcopy-ram"})
    incoming.listen(f"unix:{tmp_path}/in")
    outgoing = made.outgoing(
        mine.guest, capabilities={"postcopy-ram"}, postcopy=AfterPasses(1), on_event=seen.append
    )
    outgoing.start(incoming.uri)
    assert outgoing.wait(FOREVER)
    assert incoming.wait(FOREVER)
    assert StatusChanged(Status.POSTCOPY_ACTIVE) not in seen
    assert other.same_as(mine)


def test_policies_need_the_capability():
    for policy in ({"postcopy": AfterPasses()}, {"recovery": Retry()}):
        source = OutgoingMigration(box().guest, **policy)
        with pytest.raises(OptionError, match="needs capability 'postcopy-ram'"):
            source.start("unix:/nowhere")
        assert source.status == Status.NONE


# ---- recovery --------------------------------------------------------------------------------


def test_waits_grow_and_begin_anew():
    now = [0.0]
    retry = Retry(first=1.0, factor=2.0, longest=5.0, clock=lambda: now[0])
    error = ChannelError("cut")
    assert [retry.broken("unix:/a", error) for _ in range(5)] == [
        Attempt(s, "unix:/a") for s in (1.0, 2.0, 4.0, 5.0, 5.0)
    ]
    retry.recovered()
    assert retry.broken("unix:/a", error) == Attempt(1.0, "unix:/a")
    assert retry.attempts == 1


def test_addresses_come_in_turn_and_time_is_up():
    now = [10.0]
    retry = Retry("unix:/b", "unix:/c", first=1.0, within=4.0, clock=lambda: now[0])
    error = ChannelError("cut")
    assert retry.broken("unix:/a", error) == Attempt(1.0, "unix:/b")
    now[0] += 1
    assert retry.broken("unix:/b", error) == Attempt(2.0, "unix:/c")
    now[0] += 2
    # the last one comes when the time is up
    assert retry.broken("unix:/c", error) == Attempt(1.0, "unix:/b")
    now[0] += 1
    assert retry.broken("unix:/b", error) is None
    for wrong in ({"first": -1}, {"factor": 0.5}, {"first": 2, "longest": 1}):
        with pytest.raises(ValueError, match="waits"):
            Retry(**wrong)


QUICK = {"first": 0.001, "longest": 0.01}


def test_it_recovers_without_its_owner(postcopies):
    seen = []
    mine, far = box(), postcopies.far(limits=(60 * PAGE, 20 * PAGE, 100, 20 * PAGE))
    source = postcopies.source(
        mine.guest,
        recovery=Retry(**QUICK),
        on_event=lambda e: seen.append(e.status) if isinstance(e, StatusChanged) else None,
    )
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert seen.count(Status.POSTCOPY_PAUSED) >= 3
    assert far.same_as(mine.memory)
    assert not far.twice
    assert mine.calls == ["stop"]


def test_it_finds_another_address(postcopies, tmp_path):
    mine, far = box(), postcopies.far(limits=(60 * PAGE,))
    away = f"unix:{tmp_path}/away"
    # the last one cannot even be tried
    uris = (away, f"file:{tmp_path}/f", "nonsense", far.uri)
    source = postcopies.source(mine.guest, recovery=Retry(*uris, **QUICK))
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_when_it_gives_up_the_owner_can_go_on(postcopies, tmp_path):
    mine, far = box(), postcopies.far(limits=(60 * PAGE,))
    retry = Retry(f"unix:{tmp_path}/away", within=0.05, **QUICK)
    source = postcopies.source(mine.guest, recovery=retry)
    source.start(far.uri)
    until(lambda: source.waits_for_owner)
    assert "away" in source.query().error
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not source.waits_for_owner


def test_the_owner_comes_first(postcopies, tmp_path):
    slow = Retry(first=1000, longest=1000)
    mine, far = box(), postcopies.far(limits=(60 * PAGE,))
    source = postcopies.source(mine.guest, recovery=slow)
    source.start(far.uri)
    is_paused(source)
    assert not source.waits_for_owner
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_it_can_be_given_up_while_it_waits(postcopies):
    far = postcopies.far(limits=(60 * PAGE,))
    source = postcopies.source(box().guest, recovery=Retry(first=1000, longest=1000))
    source.start(far.uri)
    is_paused(source)
    source.abandon()
    assert isinstance(error_of(source), PeerError)


def test_a_pause_by_hand_is_not_undone(postcopies):
    mine = box()
    source, far = postcopies.started(mine, background=False, recovery=Retry(**QUICK))
    until(lambda: far.running)
    source.pause()
    is_paused(source)
    threading.Event().wait(0.05)
    assert source.waits_for_owner
    assert len(far.links) == 1
    source.recover(far.uri)
    until(lambda: source.status == Status.POSTCOPY_ACTIVE)
    # by itself from now on
    source.background = True
    far.cut()
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_a_policy_that_fails_leaves_it_to_the_owner(postcopies):
    class Slip:
        def broken(self, uri, error):
            raise RuntimeError("a slip")

        def recovered(self):
            pass

    mine, far = box(), postcopies.far(limits=(60 * PAGE,))
    source = postcopies.source(mine.guest, recovery=Slip())
    source.start(far.uri)
    is_paused(source)
    assert source.waits_for_owner
    assert "a slip" in source.query().error
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


@pytest.mark.filterwarnings("default:a recovery policy:RuntimeWarning")
def test_a_policy_that_fails_at_good_news_does_no_harm(postcopies):
    class Slip(Retry):
        def recovered(self):
            super().recovered()
            raise RuntimeError("a slip")

    mine = box()
    source, far = postcopies.started(mine, limits=(60 * PAGE,), recovery=Slip(**QUICK))
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_a_pause_by_hand_at_the_moment_of_a_break_is_not_undone(postcopies):
    """The policy has been asked already."""
    seen = []

    class Late(Retry):
        def broken(self, uri, error):
            if not seen:
                seen.append(source.status)
                source.pause()
            return super().broken(uri, error)

    mine = box()
    source, far = postcopies.started(mine, background=False, recovery=Late(**QUICK))
    until(lambda: far.running)
    far.cut()
    is_paused(source)
    threading.Event().wait(0.05)
    assert seen == [Status.POSTCOPY_ACTIVE]
    assert source.waits_for_owner
    assert len(far.links) == 1
    source.background = True
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_another_process_may_try_until_somebody_is_there(postcopies, tmp_path):
    mine = box()
    first, far = postcopies.paused(mine)
    first.abandon()
    error_of(first)
    uris = (f"unix:{tmp_path}/nobody", far.uri)
    second = mig.restore(
        mine.guest,
        uris[0],
        resume=True,
        capabilities=["postcopy-preempt"] if postcopies.preempt else (),
        recovery=Retry(*uris, **QUICK),
    )
    postcopies.sources.append(second)
    assert second.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice


@pytest.mark.parametrize("retry", [True, False])
def test_the_command_tries_again(postcopies, tmp_path, retry):
    mine = box()
    kept = OutgoingMigration(mine.guest)
    kept.start(f"file:{tmp_path}/vm.mig")
    assert kept.wait(FOREVER)
    far = postcopies.far(limits=(60 * PAGE,))
    more = ["-c", "postcopy-preempt"] if postcopies.preempt else []
    more += ["--retry", "20"] if retry else []
    result = CliRunner().invoke(
        main, ["send", str(tmp_path / "vm.mig"), far.uri, "--postcopy", *more]
    )
    assert result.exit_code == (0 if retry else 1), result.output
    if retry:
        assert far.same_as(mine.memory)


def test_retry_belongs_to_postcopy():
    result = CliRunner().invoke(main, ["send", "nothing", "unix:/x", "--retry", "1"])
    assert result.exit_code == 2
    assert "--retry belong to --postcopy" in result.output


# ---- release-ram -----------------------------------------------------------------------------


class Given:
    """A guest of private and of shared memory, whose pages can be counted."""

    def __init__(self, host_page_size: int | None = None) -> None:
        self.memory = mig.GuestMemory()
        self.fd = os.memfd_create("shared")
        self.memory.add("private", 300 * PAGE, host_page_size=host_page_size)
        self.memory.add("shared", 64 * PAGE, fd=self.fd)
        for block in self.memory:
            for at in range(0, block.used_length, PAGE):
                block.view[at : at + 8] = (at + 1).to_bytes(8, "big")
        self.before = {b.idstr: bytes(b.view) for b in self.memory}
        self.calls: list[str] = []
        self.log = mig.SharedDirtyLog({"private": 300, "shared": 64})
        self.guest = mig.MemoryGuest("box", self.memory, dirty=self.log)

    @property
    def left(self) -> dict[str, set[int]]:
        """Pages that are still there."""
        return {
            b.idstr: {n for n in range(b.pages.npages) if any(b.view[n * PAGE : n * PAGE + 8])}
            for b in self.memory
        }

    def same_as(self, far) -> bool:
        return all(
            far.pages[name][n] == data[n * PAGE : (n + 1) * PAGE]
            for name, data in self.before.items()
            for n in range(len(data) // PAGE)
        )

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


@pytest.fixture
def given():
    given = Given()
    yield given
    given.close()


RELEASE = {"release-ram"}


def test_what_was_sent_is_given_back(postcopies, given):
    far = postcopies.far()
    source = postcopies.source(given.guest, background=False, capabilities=RELEASE)
    source.start(far.uri)
    until(lambda: far.running)
    assert {n: len(p) for n, p in given.left.items()} == {"private": 300, "shared": 64}
    far.request("private", 100 * PAGE, 3 * PAGE)
    far.request("shared", 7 * PAGE)
    until(lambda: given.left["shared"] == set(range(64)) - {7})
    assert given.left["private"] == set(range(300)) - {100, 101, 102}
    source.background = True
    assert source.wait(FOREVER)
    assert given.same_as(far)
    # not only cleared: the file has no memory any more but what was looked at
    assert os.fstat(given.fd).st_blocks * 512 <= PAGE
    assert given.left == {"private": set(), "shared": set()}


def test_what_went_in_precopy_is_given_back_when_the_guest_has_gone(postcopies, given):
    far = postcopies.far()
    source = postcopies.source(
        given.guest,
        at_once=False,
        background=False,
        capabilities=RELEASE,
        parameters={"max-bandwidth": 1 << 20},
    )
    source.start(far.uri)
    until(lambda: far.has("private", 100))
    given.log.mark("private", 9)
    assert len(given.left["private"]) == 300
    source.start_postcopy()
    until(lambda: far.running)
    until(lambda: len(given.left["private"]) < 300)
    missing = set(range(300)) - set(far.pages["private"])
    assert 9 in missing
    until(lambda: given.left["private"] == missing)
    source.background = True
    assert source.wait(FOREVER)
    assert given.same_as(far)
    assert given.left == {"private": set(), "shared": set()}


def test_what_is_given_back_cannot_be_recovered(postcopies, given):
    far = postcopies.far()
    source = postcopies.source(given.guest, background=False, capabilities=RELEASE)
    source.start(far.uri)
    until(lambda: far.running)
    far.cut()
    is_paused(source)
    with pytest.raises(OptionError) as caught:
        source.recover(far.uri)
    assert str(caught.value) == ("Postcopy recovery cannot work when release-ram capability is set")
    assert source.status == Status.POSTCOPY_PAUSED
    source.abandon()
    error_of(source)
    again = postcopies.source(given.guest, at_once=False, capabilities=RELEASE)
    with pytest.raises(OptionError, match="release-ram"):
        again.start(far.uri, resume=True)
    policy = postcopies.source(given.guest, capabilities=RELEASE, recovery=Retry())
    with pytest.raises(OptionError, match="release-ram"):
        policy.start(far.uri)


def test_host_pages_are_given_back_whole(postcopies):
    """One of 16 MiB goes in several batches."""
    asked: list[tuple[str, int, int]] = []
    memory = mig.GuestMemory()
    memory.add("huge", 2 * 4096 * PAGE, host_page_size=4096 * PAGE)

    class Guest(mig.MemoryGuest):
        def release_pages(self, idstr, first, npages):
            asked.append((idstr, first, npages))

    far = postcopies.far()
    far.host_pages = {"huge": 4096 * PAGE}
    source = postcopies.source(Guest("box", memory), capabilities=RELEASE)
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert asked == [("huge", 0, 4096), ("huge", 4096, 4096)]
    memory.close()


def test_memory_that_cannot_be_given_back_stays(postcopies, tmp_path):
    """An image, and a guest whose memory the kernel does not take."""
    mine = box()
    tries = []

    def refuses(idstr, first, npages):
        tries.append(idstr)
        raise OSError("no")

    mine.guest.release_pages = refuses
    source, far = postcopies.started(mine, capabilities=RELEASE)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert sorted(tries) == [RAM, "vga.vram"]
    kept = OutgoingMigration(mine.guest)
    kept.start(f"file:{tmp_path}/vm.mig")
    assert kept.wait(FOREVER)
    with mig.open_image(tmp_path / "vm.mig") as image:
        far = postcopies.far()
        source = postcopies.source(image, capabilities=RELEASE)
        source.start(far.uri)
        assert source.wait(FOREVER)
        assert far.same_as(mine.memory)
        assert source.query().ram.duplicate + source.query().ram.normal == TOTAL


def test_nothing_is_given_back_without_postcopy(postcopies, given):
    source = postcopies.source(given.guest, at_once=False, capabilities=RELEASE)
    far = postcopies.far()
    source.start(far.uri)
    assert source.wait(FOREVER)
    assert len(given.left["private"]) == 300
    with pytest.raises(MigError):
        source.recover(far.uri)
