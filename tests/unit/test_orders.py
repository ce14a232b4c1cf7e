"""The order of pages in a restore: what is recorded, what is near, and how it is kept."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.answers import Answering
from unit.boxes import FOREVER, PAGE, Box
from unit.far import until
from unit.postcopies import RAM, VGA, box, is_paused

import mig
from mig import OrderFile, OutgoingMigration, _core
from mig.engine.postcopy import PostcopySender
from mig.engine.requests import Courtesy
from mig.errors import (
    ChannelError,
    MismatchError,
    OptionError,
    StreamError,
    TruncatedError,
    UnsupportedError,
)
from mig.postcopy.faultorder import (
    MAX_NOTED,
    MAX_RUNS,
    FaultLog,
    FaultOrder,
    identity,
    split,
)
from mig.ram.search import PageSearch, SourceBlock

GUEST = bytes(range(32))


def order_of(*pages: tuple[int, int]) -> FaultOrder:
    """The order of single pages: (block, page)."""
    log = FaultLog(None, record=True)
    for block, page in pages:
        log.note(block, page, 1, 0)
    return FaultOrder(PAGE, GUEST, np.empty(0, np.uint64)).merged([log])


def pages_of(order: FaultOrder) -> list[tuple[int, int]]:
    columns = (column.tolist() for column in split(order.runs))
    return [(b, f + i) for b, f, n in zip(*columns, strict=True) for i in range(n)]


# ---- the file --------------------------------------------------------------------------------

PAGES = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, (1 << 40) - 2)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(pages=PAGES)
def test_what_is_encoded_is_decoded(pages):
    order = order_of(*pages)
    assert pages_of(order) == list(dict.fromkeys(pages))
    again = FaultOrder.decode(order.encode())
    assert pages_of(again) == pages_of(order)
    assert (again.page_size, again.guest) == (PAGE, GUEST)


def test_the_octets_are_those_of_the_documentation():
    order = order_of((1, 7), (1, 8), (0, 3))
    runs = struct.pack(">QQ", 1 << 52 | 1 << 40 | 7, 3)
    data = b"MIGORDER" + struct.pack(">II", 1, PAGE) + GUEST + struct.pack(">Q", 2) + runs
    assert order.encode() == data + struct.pack(">I", zlib.crc32(data))


def test_a_long_request_makes_runs_of_4096_pages():
    log = FaultLog(None, record=True)
    log.note(2, 10, 10_000, 0)
    order = FaultOrder(PAGE, GUEST, np.empty(0, np.uint64)).merged([log])
    assert len(order.runs) == 3
    assert pages_of(order) == [(2, 10 + i) for i in range(10_000)]


def broken(data: bytes, at: int, new: bytes, *, sign: bool = True) -> bytes:
    data = data[:at] + new + data[at + len(new) :]
    return data[:-4] + struct.pack(">I", zlib.crc32(data[:-4])) if sign else data


DATA = order_of((0, 5), (0, 9), (1, 2)).encode()


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", TruncatedError, "of 0 bytes"),
        (DATA[:59], TruncatedError, "of 59 bytes"),
        (DATA[:-1], TruncatedError, "3 runs has 83 bytes, not 84"),
        (DATA + b"\0", StreamError, "has 85 bytes, not 84"),
        (broken(DATA, 0, b"QEVM"), StreamError, "begins with"),
        (broken(DATA, 8, b"\0\0\0\2"), UnsupportedError, "version 2"),
        (broken(DATA, 48, b"\xff" * 8), StreamError, "of 18446744073709551615 runs"),
        (broken(DATA, 48, struct.pack(">Q", MAX_RUNS)), TruncatedError, "not 33554492"),
        (broken(DATA, 70, b"\1", sign=False), StreamError, "checksum"),
    ],
)
def test_what_is_no_fault_order_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        FaultOrder.decode(data)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7), cut=st.integers(0, len(DATA)))
def test_damage_is_found(at, bit, cut):
    damaged = bytearray(DATA)
    damaged[at] ^= 1 << bit
    for data in (bytes(damaged), DATA[:cut] if cut < len(DATA) else DATA + b"x"):
        with pytest.raises(StreamError):
            FaultOrder.decode(data)


def test_an_order_is_checked_against_its_guest():
    order = order_of((0, 5), (1, 2))
    order.check(PAGE, GUEST, [6, 3])
    for args, words in [
        ((PAGE, bytes(32), [6, 3]), "of another guest"),
        ((2 * PAGE, GUEST, [6, 3]), "of another guest"),
        ((PAGE, GUEST, [6, 2]), "page 2 of 2 of block 1"),
        ((PAGE, GUEST, [6]), "has a block 1"),
        ((PAGE, GUEST, []), "has a block 1"),
    ]:
        with pytest.raises(MismatchError, match=words):
            order.check(*args)
    twice = FaultOrder(PAGE, GUEST, np.repeat(order.runs, 5))
    with pytest.raises(MismatchError, match="more than once"):
        twice.check(PAGE, GUEST, [6, 3])
    order_of().check(PAGE, GUEST, [])


def test_guests_are_told_apart():
    blocks = [("ram", 4096), ("vga", 8192)]
    one = identity(PAGE, blocks, b"devices")
    assert len(one) == 32
    others = [
        identity(2 * PAGE, blocks, b"devices"),
        identity(PAGE, blocks[::-1], b"devices"),
        identity(PAGE, [("ram", 4096), ("vga", 4096)], b"devices"),
        identity(PAGE, blocks, b"device"),
    ]
    assert len({one, *others}) == 5


# ---- learning --------------------------------------------------------------------------------


def merged_by_hand(pages, requests):
    """requests: (place, page) of each log"""
    noted = sorted(
        ((place, i, n, page) for n, log in enumerate(requests) for i, (place, page) in log),
        key=lambda x: x[:3],
    )
    out = []
    for place, page in enumerate([*pages, None]):
        out += [p for at, _, _, p in noted if at == place]
        if page is not None:
            out.append(page)
    return list(dict.fromkeys(out))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_was_asked_for_goes_before_what_had_not_been_sent(data):
    # every other page, so that each is a run
    pages = data.draw(st.lists(st.integers(0, 30), unique=True, max_size=12))
    order = order_of(*((0, 2 * page) for page in pages))
    places = st.tuples(st.integers(0, len(pages)), st.integers(0, 40))
    requests = data.draw(st.lists(st.lists(places, max_size=8), max_size=3))
    logs = []
    for some in requests:
        logs.append(FaultLog(order, record=True))
        for place, page in some:
            logs[-1].note(0, 2 * page, 1, place)
    got = order.merged(logs)
    expected = merged_by_hand(pages, [list(enumerate(some)) for some in requests])
    assert pages_of(got) == [(0, 2 * page) for page in expected]


def test_a_flood_of_requests_is_noted_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("mig.postcopy.faultorder.MAX_NOTED", 10)
    log = FaultLog(None, record=True)
    for i in range(50):
        log.note(0, i, 1, 0)
    log.note(4096, 0, 1, 0)
    log.note(0, 1 << 40, 1, 0)
    runs, places = log.noted()
    assert len(runs) == len(places) == 10
    assert MAX_NOTED >= 1 << 20
    silent = FaultLog(None, record=False)
    silent.note(0, 0, 1, 0)
    assert not len(silent.noted()[0])


def test_a_log_is_read_while_it_is_written():
    log, ended = FaultLog(None, record=True), threading.Event()
    errors = []

    def write():
        try:
            for i in range(30_000):
                log.note(0, i, 1, i)
        except BaseException as error:
            errors.append(error)
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        runs, places = log.noted()
        assert runs.tolist() == places.tolist() == list(range(len(runs)))
    thread.join()
    assert not errors


# ---- what goes when --------------------------------------------------------------------------


def search_of(*npages: int, group: int = 1) -> PageSearch:
    blocks = [
        SourceBlock(
            f"b{i}",
            n * PAGE,
            _core.Pages(np.zeros((n, PAGE), np.uint8), PAGE),
            True,
            _core.Bitmap(n, fill=True),
            host_page_size=group * PAGE,
        )
        for i, n in enumerate(npages)
    ]
    return PageSearch(blocks)


def taken(search: PageSearch | Answering, most: int = 64) -> tuple[str, list[int]]:
    batch = search.next_batch(most)
    return ("", []) if batch is None else (batch.block.idstr, batch.index.tolist())


def rest(search: PageSearch, most: int = 64) -> list[tuple[str, int]]:
    return [
        (name, page)
        for name, pages in iter(lambda: taken(search, most), ("", []))
        for page in pages
    ]


def test_what_was_recorded_goes_first_in_batches():
    search = search_of(100, 50)
    search.follow(order_of((0, 90), (0, 3), (0, 4), (1, 7), (1, 8), (0, 1)))
    # neighbours make one piece
    assert taken(search) == ("b0", [3, 4, 90])
    assert search.place == 2
    assert taken(search, 1) == ("b1", [7])
    assert taken(search) == ("b1", [8])
    assert taken(search) == ("b0", [1])
    left = rest(search)
    assert left == [("b0", n) for n in range(100) if n not in (1, 3, 4, 90)] + [
        ("b1", n) for n in range(50) if n not in (7, 8)
    ]


def test_recorded_pages_that_were_sent_are_passed_over():
    search = search_of(200)
    walk = Answering(search)
    search.follow(order_of(*((0, n) for n in range(150, 190, 2))))
    walk.take(search["b0"], 150, 30)
    assert taken(walk, 5) == ("b0", [180, 182, 184, 186, 188])


def test_a_long_order_of_nothing_does_not_hold_requests_up():
    search = search_of(8000)
    search.follow(order_of(*((0, n) for n in range(0, 6000, 2))))
    search["b0"].dirty.clear(0, 6000)
    search.remaining = 2000 * PAGE
    assert taken(search, 10) == ("b0", list(range(6000, 6010)))
    assert 0 < search.place < 3000
    assert len(rest(search)) == 1990


def test_after_a_break_the_order_begins_anew():
    search = search_of(100)
    search.follow(order_of((0, 50), (0, 60)))
    assert taken(search) == ("b0", [50, 60])
    search.replace_dirty("b0", _core.Bitmap(100, fill=True))
    search.rewind()
    assert taken(search, 1) == ("b0", [50])


def test_what_is_near_a_request_goes_next():
    search = search_of(1000)
    walk = Answering(search)
    walk.take(search["b0"], 500, 1)
    assert taken(walk) == ("b0", [*range(492, 500), *range(501, 517)])
    assert taken(walk, 2) == ("b0", [517, 518])


def test_the_last_request_is_served_first():
    search = search_of(1000)
    walk = Answering(search)
    for page in (100, 500, 900):
        walk.take(search["b0"], page, 1)
    assert taken(walk, 16) == ("b0", list(range(901, 917)))
    assert taken(walk, 8) == ("b0", list(range(892, 900)))
    assert taken(walk, 16) == ("b0", list(range(501, 517)))


def test_reading_ahead_grows_with_a_sequence():
    search = search_of(100_000)
    walk = Answering(search)
    page, windows = 5000, []
    for _ in range(12):
        walk.take(search["b0"], page, 1)
        count = 0
        while (pages := taken(walk)[1]) and min(pages) > page and count < 1024:
            count += len(pages)
        windows.append(search._order._near[0].window)
        page = search._order._near[0].limit
    assert windows[:7] == [16, 32, 64, 128, 256, 512, 1024]
    assert set(windows[7:]) == {1024}


def test_a_request_for_what_is_on_its_way_counts_too():
    search = search_of(1000)
    walk = Answering(search)
    walk.take(search["b0"], 100, 1)
    assert taken(walk)[1][-1] == 116
    assert walk.take(search["b0"], 110, 1) is None
    assert search._order._near[0].window == 32
    assert taken(walk)[1][0] == 117


def test_only_so_many_neighbourhoods_are_known():
    search = search_of(100_000)
    walk = Answering(search)
    for page in range(0, 100_000, 1000):
        walk.take(search["b0"], page, 1)
    assert len(search._order._near) == 16


@pytest.mark.parametrize("group", [1, 8, 64, 2048])
@pytest.mark.parametrize("seed", range(3))
def test_no_page_is_lost_or_sent_twice_and_host_pages_are_whole(group, seed):
    rng = random.Random(seed)
    npages = [4096, 2048]
    search = search_of(*npages, group=group)
    wanted = [(b, n) for b in (0, 1) for n in rng.sample(range(npages[b]), 50)]
    rng.shuffle(wanted)
    search.follow(order_of(*wanted))
    walk = Answering(search)
    sent: list[tuple[str, int]] = []
    while walk.remaining:
        if not walk.inside_host_page and rng.random() < 0.3:
            block = search[f"b{rng.randrange(2)}"]
            batch = walk.take(block, rng.randrange(block.pages.npages), 1)
        else:
            batch = walk.next_batch(rng.choice([1, 7, 64, 1024]))
        if batch is not None:
            sent += [(batch.block.idstr, n) for n in batch.index.tolist()]
            assert sorted(batch.index.tolist()) == batch.index.tolist()
    assert len(sent) == len(set(sent)) == sum(npages)
    groups = [(name, n // group) for name, n in sent]
    assert len([key for key, _ in itertools.groupby(groups)]) == len(set(groups))


def test_blocks_that_are_not_searched_are_passed_over():
    blocks = search_of(10, 10).blocks
    shared = SourceBlock(
        "s", 10 * PAGE, blocks[0].pages, True, _core.Bitmap(10), shared=True, address=1 << 30
    )
    plain = SourceBlock("p", 10 * PAGE, blocks[1].pages, True, blocks[1].dirty, address=0)
    search = PageSearch([shared, plain], ignore_shared=True)
    search.follow(order_of((0, 3), (1, 4)))
    assert taken(search, 1) == ("p", [4])


# ---- restores --------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    mine = box()
    kept = OutgoingMigration(mine.guest)
    kept.start(f"file:{tmp_path}/vm.mig")
    assert kept.wait(FOREVER)
    with mig.open_image(tmp_path / "vm.mig") as image:
        yield image


def recorded(postcopies, image, requests, **options):
    """Restore; ask for pages one by one, then take the rest."""
    far = postcopies.far()
    source = mig.restore(image, far.uri, background=False, record=True, **options)
    postcopies.sources.append(source)
    until(lambda: far.running)
    for block, page in requests:
        far.request(block, page * PAGE)
        until(lambda b=block, p=page: far.has(b, p))
    source.background = True
    assert source.wait(FOREVER)
    assert far.same_as(box().memory)
    return far


def background_order(postcopies, image, **options):
    far = postcopies.far()
    source = mig.restore(image, far.uri, parameters={"max-postcopy-bandwidth": 16 << 20}, **options)
    postcopies.sources.append(source)
    assert source.wait(FOREVER)
    assert far.same_as(box().memory)
    assert not far.twice
    return [x[1:3] for x in far.heard if x[0] == "page"]


def test_a_second_restore_begins_with_what_the_first_one_asked_for(postcopies, image, tmp_path):
    asked = [(RAM, 400), (VGA, 3), (RAM, 17), (RAM, 222)]
    assert background_order(postcopies, image)[0] == (RAM, 0)
    recorded(postcopies, image, asked)
    path = tmp_path / "vm.mig.order"
    data = path.read_bytes()
    assert pages_of(FaultOrder.decode(data)) == [(0, 400), (1, 3), (0, 17), (0, 222)]
    order = background_order(postcopies, image)
    # what goes in one batch is sorted
    assert order[:4] == [(RAM, 400), (VGA, 3), (RAM, 17), (RAM, 222)]
    assert background_order(postcopies, image, order=False)[0] == (RAM, 0)
    assert path.read_bytes() == data
    # it is the guest that counts, not the name or place of its file
    moved = tmp_path / "moved.mig"
    moved.write_bytes((tmp_path / "vm.mig").read_bytes())
    with mig.open_image(moved) as other:
        assert background_order(postcopies, other, order=path)[0] == (RAM, 400)


def test_it_is_written_at_a_break_and_gets_better(postcopies, image, tmp_path):
    path = tmp_path / "named"
    far = postcopies.far()
    source = mig.restore(image, far.uri, background=False, order=path, record=True)
    postcopies.sources.append(source)
    until(lambda: far.running)
    far.request(RAM, 99 * PAGE)
    until(lambda: far.has(RAM, 99))
    assert not path.exists()
    far.cut()
    is_paused(source)
    until(path.exists)
    assert pages_of(FaultOrder.decode(path.read_bytes())) == [(0, 99)]
    source.recover(far.uri)
    until(lambda: source.status == mig.Status.POSTCOPY_ACTIVE)
    far.request(RAM, 7 * PAGE)
    until(lambda: far.has(RAM, 7))
    source.background = True
    assert source.wait(FOREVER)
    assert pages_of(FaultOrder.decode(path.read_bytes())) == [(0, 99), (0, 7)]
    # asked for before page 99 came from the order: it goes in front
    recorded(postcopies, image, [(RAM, 300), (RAM, 99)], order=path)
    assert pages_of(FaultOrder.decode(path.read_bytes())) == [(0, 300), (0, 99), (0, 7)]
    assert not list(tmp_path.glob(".*"))


def test_several_restores_add_to_one_order(postcopies, image):
    orders = OrderFile(image, record=True)
    for pages in ([(RAM, 1), (RAM, 5)], [(RAM, 1), (RAM, 9)]):
        recorded(postcopies, image, pages, order=orders)
    found = pages_of(FaultOrder.decode(orders.path.read_bytes()))
    assert found[0] == (0, 1)
    assert set(found) == {(0, 1), (0, 5), (0, 9)}


@pytest.mark.parametrize("what", ["garbage", "another guest", "folder", "pipe", "endless"])
def test_an_order_that_cannot_be_used(postcopies, image, tmp_path, what):
    path = tmp_path / "vm.mig.order"
    if what == "garbage":
        path.write_bytes(b"MIGORDER" + os.urandom(500))
    elif what == "another guest":
        path.write_bytes(order_of((0, 1)).encode())
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.warns(RuntimeWarning, match=r"vm.mig.order is ignored: "):
        assert background_order(postcopies, image)[0] == (RAM, 0)
    with pytest.raises((StreamError, ChannelError), match=r"vm.mig.order: "):
        mig.restore(image, "unix:/none", order=path)


def test_a_file_that_is_named_must_be_there_and_is_never_replaced_by_mistake(image, tmp_path):
    with pytest.raises(ChannelError, match="No such file"):
        OrderFile(image, tmp_path / "none")
    assert OrderFile(image, tmp_path / "none", record=True).order is None
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * 100)
    with pytest.raises(StreamError):
        OrderFile(image, precious, record=True)
    memory = Box(1).guest
    assert OrderFile(memory).order is None
    with pytest.raises(OptionError, match="path"):
        OrderFile(memory, record=True)


def test_an_order_that_cannot_be_written_is_a_warning(image, tmp_path):
    said = []
    orders = OrderFile(image, tmp_path / "none" / "order", record=True, warn=said.append)
    orders.save()
    assert "is not written: No such file" in said[0]


# ---- courtesy --------------------------------------------------------------------------------


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_background_waits_while_the_guest_asks():
    """Long when the guest begins, a little later, and never for ever."""
    clock = Time()
    courtesy = Courtesy(clock)
    assert courtesy.left() == 0
    courtesy.begin()
    assert courtesy.left() == pytest.approx(0.02)
    clock.now += 0.015
    courtesy.requested()
    assert courtesy.left() == pytest.approx(0.02)
    for _ in range(10):
        clock.now += 0.01
        courtesy.requested()
    # 0.115 s without a page of the background
    assert courtesy.left() == 0
    courtesy.sent()
    assert courtesy.left() == pytest.approx(0.02)
    clock.now += 1
    courtesy.requested()
    courtesy.sent()
    assert courtesy.left() == pytest.approx(0.0005)
    clock.now += 0.001
    assert courtesy.left() == 0


def test_what_is_near_does_not_wait():
    """Only the rest does: the sender sleeps before it, and is woken by requests."""
    search = search_of(2000)
    walk = Answering(search)
    requests = walk.requests
    clock = Time()
    requests.courtesy = Courtesy(clock)
    sent: list[int] = []
    slept: list[float] = []

    class Saver:
        nbytes = 0

        def part(self, batch) -> None:
            sent.extend(batch.index.tolist())

    def sleep(seconds, *, heedful=True):
        slept.append(len(sent))
        if len(slept) == 1:
            requests.add("b0", 1000 * PAGE, PAGE)
        else:
            clock.now += seconds + 1e-6

    PostcopySender(
        walk, requests, Saver(), bandwidth=lambda: 0, background=lambda: True, sleep=sleep
    ).run()
    assert walk.came() == [("b0", 1000)]
    assert sorted([*sent, 1000]) == list(range(2000))
    assert slept[:2] == [0, 24]
    assert sent[:24] == [*range(1001, 1017), *range(992, 1000)]


# ---- many at once ----------------------------------------------------------------------------


def test_ten_restores_at_once_share_one_image(image, made, tmp_path):
    """Into guests of mig's that really fault; only one mapping, one set of pages."""
    ends = []
    for number in range(10):
        other = Box()
        incoming = made.incoming(other.guest, capabilities={"postcopy-ram"})
        incoming.listen(f"unix:{tmp_path / f'in{number}'}")
        ends.append((other, incoming))
    barrier, sources = threading.Barrier(10), [None] * 10

    def run(number: int) -> None:
        barrier.wait(FOREVER)
        sources[number] = mig.restore(image, ends[number][1].uri)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FOREVER)
    mine = box()
    for (other, incoming), source in zip(ends, sources, strict=True):
        assert source.wait(FOREVER)
        assert incoming.wait(FOREVER)
        assert other.same_as(mine)
        other.memory.close()
    image.close()
    with pytest.raises(ValueError, match="closed"):
        image.source_blocks()


def test_an_image_that_is_being_sent_is_not_closed(postcopies, image):
    fars = [postcopies.far() for _ in range(2)]
    sources = [mig.restore(image, far.uri, background=False) for far in fars]
    postcopies.sources += sources
    for far in fars:
        until(lambda far=far: far.running)
    sources[0].background = True
    assert sources[0].wait(FOREVER)
    # the other one still sends, and goes on as if nothing had been tried
    with pytest.raises(BufferError):
        image.close()
    fars[1].request(RAM, 5 * PAGE)
    until(lambda: fars[1].has(RAM, 5))
    assert image.page(RAM, 5) is not None
    sources[1].background = True
    assert sources[1].wait(FOREVER)
    for far in fars:
        assert far.same_as(box().memory)
    image.close()


# ---- the command -----------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mig", "send", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_command_restores_many(postcopies, image, tmp_path):
    """One of them dies; the others do not mind, and what all asked for is recorded."""
    fars = [postcopies.far() for _ in range(3)]
    options = ("--postcopy", "--background", "64k", "--record-order", "--json")
    process = command(image.path, *(far.uri for far in fars), *options)
    for n, far in enumerate(fars):
        until(lambda far=far: far.running)
        far.request(RAM, (300 + 10 * n) * PAGE)
        until(lambda far=far, n=n: far.has(RAM, 300 + 10 * n))
    fars[1].cut()
    for far in (fars[0], fars[2]):
        far.request(RAM, 0, 512 * PAGE)
        far.request(VGA, 0, 16 * PAGE)
    out, err = process.communicate(timeout=FOREVER)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith(f"mig: {fars[1].uri}: postcopy was given up")
    said = json.loads(out.splitlines()[-1])
    assert said["status"] == "failed"
    assert [m["status"] for m in said["migrations"]] == ["completed", "failed", "completed"]
    assert [m["uri"] for m in said["migrations"]] == [far.uri for far in fars]
    assert "given up" in said["migrations"][1]["error"]
    for far in (fars[0], fars[2]):
        assert far.same_as(box().memory)
    found = pages_of(FaultOrder.decode(OrderFile(image).path.read_bytes()))
    # by their turns: each was the first that its guest asked for
    assert set(found[:3]) == {(0, 300), (0, 310), (0, 320)}


def test_several_guests_get_the_same_file_also_at_once(image, made, tmp_path):
    ends = []
    for number in range(2):
        other = Box()
        incoming = made.incoming(other.guest)
        incoming.listen(f"unix:{tmp_path / f'in{number}'}")
        ends.append((other, incoming))
    process = command(image.path, *(incoming.uri for _, incoming in ends))
    out, err = process.communicate(timeout=FOREVER)
    assert process.returncode == 0, err
    assert [line.partition(": ")[0] for line in out.splitlines()] == [i.uri for _, i in ends]
    for other, incoming in ends:
        assert incoming.wait(FOREVER)
        assert other.same_as(box())


@pytest.mark.parametrize(
    ("options", "words", "status"),
    [
        (("--order", "off"), "belong to --postcopy", 2),
        (("--record-order",), "belong to --postcopy", 2),
        (("--postcopy", "--order", "/none/order"), "/none/order: No such file", 1),
        (("unix:/none/other", "nonsense:"), "nonsense", 2),
    ],
)
def test_options_that_cannot_be(image, options, words, status):
    process = command(image.path, "unix:/none/none", *options)
    _, err = process.communicate(timeout=FOREVER)
    assert process.returncode == status
    assert words in err
