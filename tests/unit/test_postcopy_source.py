"""The source's side of postcopy, with a destination made by hand at the other end."""

from __future__ import annotations

import random
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.answers import Answering
from unit.boxes import FOREVER, NPAGES, PAGE, Box, error_of
from unit.far import Far, until
from unit.postcopies import (
    RAM,
    TOTAL,
    VGA,
    box,
    is_paused,
    stands,
)

import mig
from mig import MemoryGuest, OutgoingMigration, Status, _core
from mig.engine.postcopy import PostcopySender
from mig.engine.requests import PageRequests
from mig.errors import PeerError, StreamError
from mig.guest import ProcessGuest
from mig.postcopy.source import advise, discards, package
from mig.ram.search import PageSearch, SourceBlock
from mig.savevm.devices import sections_of

# ---- what is said ----------------------------------------------------------------------------


def test_the_order_of_everything(postcopies):
    mine = box()
    source, far = postcopies.started(mine)
    assert source.wait(FOREVER)
    assert far.names() == [
        *("configuration", "open", "ping", "advise", "start", "blocks"),
        *("discard", "ping", "package", "ping"),
        *("part", "page") * (len(far.said("part"))),
        *("end", "eof"),
    ]
    assert far.said("ping") == [("ping", n) for n in (1, 2, 4)]
    assert far.said("advise") == [("advise", PAGE, PAGE)]
    assert far.said("discard") == [
        ("discard", RAM, [(0, NPAGES * PAGE)]),
        ("discard", VGA, [(0, 16 * PAGE)]),
    ]
    assert far.same_as(mine.memory)
    assert not far.twice
    assert far.said("package")[0][1] == sections_of(mine.guest.save_devices())
    assert mine.calls == ["stop"]


def test_pages_of_precopy_that_are_still_right_are_not_dropped(postcopies):
    """With a log, only what was not sent, or was written since, comes in postcopy."""
    log = mig.SharedDirtyLog({RAM: NPAGES, VGA: 16})
    mine = Box(5, dirty=log)
    far = postcopies.far()
    source = postcopies.source(mine.guest, at_once=False, parameters={"max-bandwidth": 4 << 20})
    source.start(far.uri)
    until(lambda: far.has(RAM, 100))
    log.mark(RAM, 7)
    mine.memory[RAM].view[7 * PAGE : 7 * PAGE + 5] = b"later"
    source.start_postcopy()
    assert source.wait(FOREVER)
    dropped = {
        n
        for _, name, pairs in far.said("discard")
        for start, length in pairs
        for n in range(start // PAGE, (start + length) // PAGE)
        if name == RAM
    }
    assert 7 in dropped
    assert 50 not in dropped
    assert far.same_as(mine.memory)
    assert not far.twice


def test_something_is_dropped_even_when_nothing_is_dirty(postcopies):
    search = search_of({"a": (64, 1), "b": (64, 1)}, {"a": [], "b": []})
    assert list(discards(search)) == [discard("a", [(0, 1)])]
    assert search.remaining == PAGE
    assert search["a"].dirty.indexes().tolist() == [0]
    # a block smaller than its host page
    search = search_of({"a": (3, 8)}, {"a": []})
    assert list(discards(search)) == [discard("a", [(0, 3)])]
    assert search.remaining == 3 * PAGE


def search_of(blocks, dirty, log=None) -> PageSearch:
    """blocks: {name: (pages, target pages in a host page)}"""
    made = []
    for name, (npages, group) in blocks.items():
        bitmap = _core.Bitmap(npages)
        for n in dirty[name]:
            bitmap.set(n, 1)
        pages = _core.Pages(np.zeros((npages, PAGE), np.uint8), PAGE)
        made.append(
            SourceBlock(name, npages * PAGE, pages, True, bitmap, host_page_size=group * PAGE)
        )
    return PageSearch(made, log)


def discard(name: str, runs: list[tuple[int, int]]) -> bytes:
    body = b"\0" + bytes([len(name)]) + name.encode() + b"\0"
    body += b"".join(struct.pack(">QQ", a * PAGE, (b - a) * PAGE) for a, b in runs)
    return struct.pack(">BHH", 8, 6, len(body)) + body


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    groups=st.lists(st.sampled_from([1, 2, 8, 512]), min_size=1, max_size=3),
)
def test_discards_are_what_an_oracle_says(data, groups):
    blocks, dirty, wanted, left = {}, {}, [], 0
    for i, group in enumerate(groups):
        name, npages = f"b{i}", data.draw(st.integers(1, 600))
        blocks[name] = npages, group
        dirty[name] = data.draw(st.sets(st.integers(0, npages - 1), max_size=80))
        whole = sorted(
            {
                p
                for n in dirty[name]
                for p in range(n // group * group, min((n // group + 1) * group, npages))
            }
        )
        left += len(whole)
        runs: list[list[int]] = []
        for p in whole:
            if runs and runs[-1][1] == p:
                runs[-1][1] += 1
            else:
                runs.append([p, p + 1])
        wanted += [discard(name, runs[at : at + 12]) for at in range(0, len(runs), 12)]
    search = search_of(blocks, dirty)
    got = list(discards(search))
    if wanted:
        assert got == wanted
        assert search.remaining == left * PAGE
    else:
        assert len(got) == 1


def test_advice_names_every_page_size():
    search = search_of({"a": (512, 1), "b": (1024, 512)}, {"a": [], "b": []})
    assert advise(search) == struct.pack(">BHHQQ", 8, 3, 16, PAGE | 2 << 20, PAGE)


@pytest.mark.parametrize("described", [True, False])
def test_the_package_has_the_devices_and_nothing_behind_them(described):
    state = box().guest.save_devices()
    devices = sections_of(state)
    raw = state if described else devices + b"\0"
    assert sections_of(raw) == devices
    # header, payload of 100 bytes, footer
    assert devices[0] == 4
    assert devices[-5:] == b"\x7e" + devices[1:5]
    said = package(raw)
    nested = b"\x08\0\x04\0\0" + devices + b"\x08\0\x02\0\x04\0\0\0\x03" + b"\x08\0\x05\0\0"
    ping = b"\x08\0\x02\0\x04\0\0\0"
    assert said == (
        ping + b"\2" + b"\x08\0\x07\0\x04" + struct.pack(">I", len(nested)) + nested + ping + b"\4"
    )


# ---- host pages ------------------------------------------------------------------------------


def huge_box(host_page_size: int) -> Box:
    """A guest with a block of huge pages, as far as its source can tell."""
    mine = Box(6)
    blocks = mine.guest.source_blocks

    def changed():
        found = [b for b in blocks() if b.idstr == RAM]
        return [replace(b, host_page_size=host_page_size) for b in found]

    mine.guest.source_blocks = changed
    return mine


def whole_host_pages(far: Far, per_host_page: int) -> None:
    """From LISTEN on each host page comes in one go, from its first page to its last."""
    since = far.heard.index(far.said("package")[0])
    numbers = [x[2] for x in far.heard[since:] if x[0] == "page"]
    assert len(numbers) % per_host_page == 0
    for at in range(0, len(numbers), per_host_page):
        first = numbers[at]
        assert first % per_host_page == 0
        assert numbers[at : at + per_host_page] == list(range(first, first + per_host_page))


@pytest.mark.parametrize("seed", range(4))
def test_host_pages_are_whole_whenever_it_goes_over(postcopies, seed):
    rng = random.Random(seed)
    per_host_page = rng.choice([8, 64])
    log = mig.SharedDirtyLog({RAM: NPAGES, VGA: 16})
    mine = huge_box(per_host_page * PAGE)
    mine.guest._dirty = log
    far = postcopies.far()
    far.host_pages = {RAM: per_host_page * PAGE}
    source = postcopies.source(mine.guest, at_once=False, parameters={"max-bandwidth": 1 << 20})
    source.start(far.uri)
    # time enough to go over before all is sent
    moment = rng.randrange(NPAGES - 250)
    until(lambda: far.has(RAM, moment))
    for _ in range(20):
        log.mark(RAM, rng.randrange(NPAGES))
    source.start_postcopy()
    assert source.wait(FOREVER)
    whole_host_pages(far, per_host_page)
    ram = mine.memory[RAM].view
    assert all(far.pages[RAM][n] == ram[n * PAGE : (n + 1) * PAGE] for n in range(NPAGES))
    assert not far.twice
    assert far.said("advise")[0][1] == per_host_page * PAGE


def test_a_host_page_that_was_broken_off_begins_anew(postcopies):
    mine = huge_box(64 * PAGE)
    far = postcopies.far()
    far.host_pages = {RAM: 64 * PAGE}
    source = postcopies.source(mine.guest, background=False)
    source.start(far.uri)
    until(lambda: far.running)
    far.request(RAM, 64 * PAGE, 64 * PAGE)
    until(lambda: far.has(RAM, 127))
    # it breaks inside the next one
    (far.beside[0] if postcopies.preempt else far.link).left = 10 * PAGE
    far.request(RAM, 128 * PAGE, 64 * PAGE)
    is_paused(source)
    # as a destination that gathers: half a host page was never there
    for n in list(far.pages[RAM]):
        if n >= 128:
            del far.pages[RAM][n]
    del far.heard[far.heard.index(far.said("package")[0]) + 1 :]
    source.recover(far.uri)
    source.background = True
    assert source.wait(FOREVER)
    whole_host_pages(far, 64)
    assert not far.twice


class Sent:
    """A RamSaver that notes pages."""

    def __init__(self, after=lambda: None) -> None:
        self.pages: list[int] = []
        self.nbytes = 0
        self._after = after

    def part(self, batch) -> None:
        self.pages += batch.index.tolist()
        self.nbytes += len(batch.index) * PAGE
        self._after()


def test_a_request_waits_for_the_end_of_a_host_page_that_was_begun():
    """One of 16 MiB is more than a batch: no other page may come in its middle."""
    walk = Answering(search_of({"a": (8192, 4096)}, {"a": range(8192)}))
    server, asked, order = walk.requests.server, threading.Event(), []

    def asks():
        asked.wait(FOREVER)
        server.answer(0, 4096, 1)
        order.append("answer")

    def after():
        order.append(len(sent.pages))
        if not asked.is_set():
            asked.set()
            until(lambda: server.waiting, "somebody who waits for the stream")

    thread = threading.Thread(target=asks)
    thread.start()
    sent = Sent(after)
    PostcopySender(
        walk,
        walk.requests,
        sent,
        bandwidth=lambda: 0,
        background=lambda: not asked.is_set(),
        sleep=lambda _, **__: time.sleep(0.001),
    ).run()
    thread.join(FOREVER)
    assert sent.pages == list(range(4096))
    assert [n for _, n in walk.came()] == list(range(4096, 8192))
    assert order[-2:] == [4096, "answer"]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("at", [0, 4096], ids=["it", "another"])
def test_who_waits_for_the_end_of_a_host_page_does_not_wait_for_the_bandwidth(shares, at):
    walk = Answering(search_of({"a": (8192, 4096)}, {"a": range(8192)}))
    server, sent, slept, threads = walk.requests.server, Sent(), [], []

    def sleep(seconds, *, heedful=True):
        n = len(sent.pages)
        slept.append(n)
        assert heedful or not walk.inside_host_page
        if n >= 3 and not threads:
            slept.clear()
            threads.append(threading.Thread(target=server.answer, args=(0, at, 1)))
            threads[0].start()
            until(lambda: server.asked if not shares else server.asked or server.waiting)
        elif n >= (4096 if shares or not at else 10):
            raise PeerError("enough")

    with pytest.raises(PeerError, match="enough"):
        PostcopySender(
            walk,
            walk.requests,
            sent,
            shares=shares,
            bandwidth=lambda: 100 * PAGE,
            background=lambda: True,
            sleep=sleep,
        ).run()
    threads[0].join(FOREVER)
    assert [n for _, n in walk.came()] == (list(range(4096, 8192)) if at else [])
    if at and not shares:
        # nobody waits for the one that was begun
        assert len(sent.pages) == 10
        return
    assert sent.pages[:4096] == list(range(4096))
    assert not [n for n in slept if n < 4096]


@pytest.mark.parametrize("shares", [True, False])
def test_a_host_page_that_was_broken_off_does_not_go_before_what_is_asked_for(shares):
    walk = Answering(search_of({"a": (8192, 4096)}, {"a": range(8192)}))
    walk.next_batch(10)
    assert walk.inside_host_page
    walk.rewind()
    walk.replace_dirty("a", _core.Bitmap(8192, fill=True))
    assert not walk.inside_host_page
    sent = Sent()

    def asks(seconds, *, heedful=True):
        walk.requests.add("a", 0, PAGE)

    walk.requests.add("a", 4096 * PAGE, PAGE)
    PostcopySender(
        walk,
        walk.requests,
        sent,
        shares=shares,
        bandwidth=lambda: 0,
        background=lambda: False,
        sleep=asks,
    ).run()
    assert not sent.pages
    assert [n for _, n in walk.came()] == [*range(4096, 8192), *range(4096)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_page_is_taken_twice_or_lost(data):
    """Whatever is asked for, and whenever the destination says what it has."""
    blocks = {"a": (300, 1), "b": (256, 8)}
    search = Answering(search_of(blocks, {"a": range(300), "b": range(256)}))
    listed = {block.idstr: block for block in search.listed}
    left = {(n, i) for n, (npages, _) in blocks.items() for i in range(npages)}
    for _ in range(data.draw(st.integers(1, 25))):
        name = data.draw(st.sampled_from(["a", "b"]))
        npages, group = blocks[name]
        step = data.draw(st.sampled_from(["take", "next", "next", "replace"]))
        if step == "replace":
            mine = data.draw(st.sets(st.integers(0, npages // group - 1), max_size=30))
            pages = {g * group + i for g in mine for i in range(group)}
            bitmap = _core.Bitmap(npages)
            for i in pages:
                bitmap.set(i, 1)
            search.replace_dirty(name, bitmap)
            left = {x for x in left if x[0] != name} | {(name, i) for i in pages}
            search.rewind()
        else:
            if step == "take":
                first = data.draw(st.integers(0, npages - 1))
                batch = search.take(listed[name], first, data.draw(st.integers(1, npages - first)))
            else:
                batch = search.next_batch(data.draw(st.integers(1, 100)))
            if batch is not None:
                got = {(batch.block.idstr, i) for i in batch.index.tolist()}
                assert len(got) == len(batch.index)
                assert got <= left
                left -= got
                if batch.block.idstr == "b":
                    assert len(got) % 8 == 0
        assert search.remaining == len(left) * PAGE
    while (batch := search.next_batch(64)) is not None:
        left -= {(batch.block.idstr, i) for i in batch.index.tolist()}
    assert not left


# ---- requests --------------------------------------------------------------------------------


def test_without_background_only_what_is_asked_for_is_sent(postcopies):
    mine = box()
    source, far = postcopies.started(mine, background=False)
    until(lambda: far.running)
    far.request(RAM, 300 * PAGE)
    until(lambda: far.has(RAM, 300))
    far.request(None, 301 * PAGE, 2 * PAGE)
    far.request(VGA, 0)
    far.request(None, 5 * PAGE)
    far.request(None, 5 * PAGE)  # on its way already
    until(lambda: far.has(VGA, 5))
    until(lambda: source.query().ram.postcopy_requests == 6)
    assert {n: set(p) for n, p in far.pages.items()} == {RAM: {300, 301, 302}, VGA: {0, 5}}
    ram = source.query().ram
    assert ram.remaining == (TOTAL - 5) * PAGE
    assert ram.postcopy_bytes > 2 * PAGE  # the others are zero
    assert ram.transferred > ram.postcopy_bytes
    assert source.status == Status.POSTCOPY_ACTIVE
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice


def test_the_background_goes_on_near_what_was_asked_for(postcopies):
    source, far = postcopies.started(box(), background=False)
    until(lambda: far.running)
    far.request(RAM, 300 * PAGE)
    until(lambda: far.has(RAM, 300))
    source.background = True
    assert source.wait(FOREVER)
    order = [x[1:3] for x in far.heard if x[0] == "page"]
    # 64 KiB behind it and 32 KiB before it, then the walk
    expected = [(RAM, n) for n in (300, *range(301, 317), *range(292, 300), *range(317, NPAGES))]
    expected += [(VGA, n) for n in range(16)] + [(RAM, n) for n in range(292)]
    assert order == expected


def test_who_waits_for_a_page_does_not_wait_for_the_bandwidth(postcopies):
    source, far = postcopies.started(box(), parameters={"max-postcopy-bandwidth": 1 << 10})
    until(lambda: far.running)
    for n in range(500, 400, -1):
        far.request(RAM, n * PAGE)
    until(lambda: all(far.has(RAM, n) for n in range(401, 501)), "100 pages at 1 KiB/s")
    assert source.status == Status.POSTCOPY_ACTIVE
    source.set_parameters({"max-postcopy-bandwidth": 0})
    assert source.wait(FOREVER)


def named(name: bytes, start=0, length=PAGE) -> tuple[int, bytes]:
    return 3, struct.pack(">QI", start, length) + name


BAD = {
    "a page of no block": (4, struct.pack(">QI", 0, PAGE)),
    "unaligned": named(b"\6pc.ram", 100),
    "half a page": named(b"\6pc.ram", 0, 100),
    "nothing": named(b"\6pc.ram", 0, 0),
    "past the end": named(b"\6pc.ram", NPAGES * PAGE),
    "over the end": named(b"\6pc.ram", (NPAGES - 1) * PAGE, 2 * PAGE),
    "far past the end": named(b"\6pc.ram", (1 << 64) - PAGE),
    "unknown": named(b"\4none"),
    "no name": named(b""),
    "an empty name": named(b"\0"),
    "a short name": named(b"\7pc.ram"),
    "a long name": named(b"\5pc.ram"),
    "not ascii": named(b"\4\xff\xfe\xfd\xfc"),
    "short": (3, b"\1\2\3"),
    "empty": (3, b""),
    "wrong length": (4, b"\0" * 11),
    "an unknown message": (99, b""),
    "too long": (3, bytes(600)),
    "a bitmap": (5, b"\6pc.ram"),
    "a resume": (6, b"\0\0\0\1"),
    "failure": (1, b"\0\0\0\1"),
    "success too early": (1, b"\0\0\0\0"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("background", [False, True])
def test_a_message_that_cannot_be_pauses(postcopies, what, background):
    """The reason is the destination's, not that the connection was cut off for it."""
    mine = box()
    source, far = postcopies.started(
        mine, background=background, parameters={"max-postcopy-bandwidth": 1 << 14}
    )
    until(lambda: far.running)
    far.link.say(*BAD[what])
    is_paused(source)
    error = source.query().error
    assert error
    assert "cancelled" not in error
    assert mine.calls == ["stop"]
    source.set_parameters({"max-postcopy-bandwidth": 0})
    source.background = True
    source.recover(far.uri)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_a_flood_of_requests_is_answered(postcopies):
    """They come faster than they are noted; each page goes once all the same."""
    mine = box()
    source, far = postcopies.started(mine, background=False)
    until(lambda: far.running)
    far.request(RAM, 0)
    count = (1 << 16) + 10
    far.link.sock.sendall(struct.pack(">HHQI", 4, 12, 0, PAGE) * count)
    far.request(None, 7 * PAGE)
    until(lambda: source.query().ram.postcopy_requests == count + 2)
    until(lambda: far.has(RAM, 7))
    assert source.query().ram.remaining == (TOTAL - 2) * PAGE
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice


def test_requests_before_the_guest_runs_wait_up_to_a_limit():
    search = search_of({"a": (64, 1)}, {"a": range(64)})
    requests = PageRequests(search)
    for number in range(1 << 16):
        requests.add("a", number % 3 * PAGE, PAGE)
    with pytest.raises(StreamError, match="more pages than it can wait for"):
        requests.add(None, 0, PAGE)
    requests.clear()
    requests.close()
    walk = Answering(search)
    walk.requests.clear()
    for number in (5, 3, 5):
        walk.requests.add("a", number * PAGE, PAGE)
    assert not walk.came()
    walk.requests.attach(_core.Descriptor(walk.fd))
    assert walk.came() == [("a", 5), ("a", 3)]
    assert walk.requests.total == 3


def test_the_last_page_may_be_one_that_was_asked_for(postcopies):
    """Without background it is over all the same, when nothing is left."""
    mine = box()
    source, far = postcopies.started(mine, background=False)
    until(lambda: far.running)
    far.request(RAM, 0, NPAGES * PAGE)
    far.request(VGA, 0, 16 * PAGE)
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)


# ---- in flight -------------------------------------------------------------------------------


def test_background_and_bandwidth_change_in_flight(postcopies):
    mine = box()
    source, far = postcopies.started(mine, background=False)
    until(lambda: far.running)
    rng = random.Random(2)
    for _ in range(40):
        source.set_parameters({"max-postcopy-bandwidth": rng.choice([1 << 10, 1 << 20, 1 << 22])})
        source.background = rng.random() < 0.5
        far.request(RAM, rng.randrange(NPAGES) * PAGE)
        threading.Event().wait(0.003)
    source.set_parameters({"max-postcopy-bandwidth": 0})
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(mine.memory)
    assert not far.twice


@pytest.mark.parametrize("dirty", ["marked", "tracked"])
def test_a_guest_that_runs_goes_over_at_any_moment(postcopies, dirty):
    log = mig.WriteTracker if dirty == "tracked" else "marked"
    for seed in range(5):
        rng = random.Random(seed)
        with ProcessGuest(2 << 20, rate=40 << 20, pattern="full", dirty=log, fill="half") as guest:
            guest.start()
            far = postcopies.far(limits=(None if seed % 2 else 3 << 20,))
            source = postcopies.source(
                guest, at_once=False, parameters={"max-bandwidth": 20 << 20, "downtime-limit": 1}
            )
            source.start(far.uri)
            moment = rng.randrange(600)
            until(lambda f=far, m=moment: len(f.said("page")) > m)
            source.start_postcopy()
            if stands(source) == Status.POSTCOPY_PAUSED:
                source.recover(far.uri)
            assert source.wait(FOREVER)
            assert not guest.running
            assert guest.verify().ok
            assert far.same_as(guest.memory)
            assert not far.twice
            assert far.running


def test_restore_is_the_same(postcopies):
    mine = box()
    far = postcopies.far()
    assert isinstance(mine.guest, MemoryGuest)
    source = mig.restore(mine.guest, far.uri, background=False)
    postcopies.sources.append(source)
    until(lambda: far.running)
    far.request(RAM, 9 * PAGE)
    until(lambda: far.has(RAM, 9))
    source.pause()
    is_paused(source)
    source.abandon()
    error_of(source)
    again = mig.restore(mine.guest, far.uri, resume=True)
    postcopies.sources.append(again)
    assert again.wait(FOREVER)
    assert far.same_as(mine.memory)


def test_one_image_runs_many_guests(postcopies, tmp_path):
    """Also with pages that it never had, which are asked for like any other."""
    mine = box()
    kept = OutgoingMigration(mine.guest)
    kept.start(f"file:{tmp_path}/vm.mig")
    assert kept.wait(FOREVER)
    with mig.open_image(tmp_path / "vm.mig") as image:
        fars = [postcopies.far() for _ in range(4)]
        sources = [mig.restore(image, far.uri, background=False) for far in fars]
        postcopies.sources += sources
        for n, (source, far) in enumerate(zip(sources, fars, strict=True)):
            until(lambda far=far: far.running)
            far.request(RAM, n * PAGE)
            until(lambda far=far, n=n: far.has(RAM, n))
            if n % 2:
                far.cut()
                is_paused(source)
                source.recover(far.uri)
            source.background = True
        for source, far in zip(sources, fars, strict=True):
            assert source.wait(FOREVER)
            assert far.same_as(mine.memory)
            assert not far.twice
            assert sections_of(mine.guest.save_devices()) == far.said("package")[0][1]
