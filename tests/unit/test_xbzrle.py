"""mig.xbzrle and mig.XbzrleCache as a program uses them."""

from __future__ import annotations

import array
import mmap
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import xbzrle as oracle

import mig
from mig import xbzrle
from mig.errors import XbzrleError

QUICK = settings(max_examples=100, deadline=None)

OLD = bytes(range(256)) * 16
NEW = OLD[:100] + b"changed" + OLD[107:4000] + b"?" * 96
ENCODING = oracle.full_encoding(OLD, NEW)


def mapped(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


#: 4096 bytes as programs have them
KINDS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "part of a view": lambda data: memoryview(b"x" + data + b"x")[1:-1],
    "mmap": mapped,
    "array": lambda data: array.array("H", data),
    "numpy": lambda data: np.frombuffer(data, dtype=np.uint8),
    "numpy in two dimensions": lambda data: np.frombuffer(data, dtype=np.uint8).reshape(64, 64),
    "numpy in three dimensions": lambda data: np.frombuffer(data, dtype=np.int32).reshape(
        4, 16, 16
    ),
    "numpy of words": lambda data: np.frombuffer(data, dtype=np.uint64),
    "numpy of big-endian words": lambda data: np.frombuffer(data, dtype=">i4"),
    "numpy of numbers": lambda data: np.frombuffer(data, dtype=np.float64),
    "numpy of bool": lambda data: np.frombuffer(data, dtype=np.uint8).view(np.bool_),
}
WRITABLE = {
    "bytearray": bytearray,
    "memoryview": lambda data: memoryview(bytearray(data)),
    "mmap": mapped,
    "array": lambda data: array.array("I", data),
    "numpy": lambda data: np.frombuffer(bytearray(data), dtype=np.uint8),
    "numpy in two dimensions": lambda data: np.frombuffer(bytearray(data), np.uint16).reshape(
        64, 32
    ),
}
READABLE = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
WRITTEN = pytest.mark.parametrize("kind", WRITABLE.values(), ids=WRITABLE.keys())


# ---- one page ------------------------------------------------------------------------------------


@READABLE
def test_encode_takes_any_contiguous_buffer(kind):
    assert xbzrle.encode(kind(OLD), NEW) == ENCODING
    assert xbzrle.encode(OLD, kind(NEW)) == ENCODING


@WRITTEN
def test_decode_writes_any_contiguous_buffer(kind):
    page = kind(OLD)
    assert xbzrle.decode(ENCODING, page) == 4096
    assert memoryview(page).tobytes() == NEW


def test_decode_takes_the_encoding_from_any_buffer():
    for kind in (bytes, bytearray, memoryview, mapped, lambda data: np.frombuffer(data, np.int8)):
        page = bytearray(OLD)
        assert xbzrle.decode(kind(ENCODING), page) == 4096
        assert page == NEW


def test_buffers_that_are_not_contiguous_are_refused():
    strided = np.zeros(8192, dtype=np.uint8)[::2]
    turned = np.zeros((64, 64), dtype=np.uint8).T[:, :32]
    for buffer in (strided, turned):
        with pytest.raises((TypeError, BufferError, ValueError)):
            xbzrle.encode(buffer, bytes(buffer.nbytes))
        with pytest.raises((TypeError, BufferError, ValueError)):
            xbzrle.decode(b"\x00\x01A", buffer)
        with pytest.raises((TypeError, BufferError, ValueError)):
            xbzrle.encode_pages(buffer, bytes(buffer.nbytes), 64)
    for nothing in (None, "text", 4096, [1, 2]):
        with pytest.raises(TypeError):
            xbzrle.encode(nothing, OLD)


def test_a_page_that_cannot_be_written_is_refused():
    for page in (OLD, memoryview(OLD), np.frombuffer(OLD, dtype=np.uint8), b""):
        with pytest.raises(BufferError):
            xbzrle.decode(ENCODING, page)
    assert OLD[100:107] != b"changed"


def test_equal_pages_encode_to_nothing_and_nothing_changes_no_page():
    assert xbzrle.encode(OLD, OLD) == b""
    page = bytearray(OLD)
    assert xbzrle.decode(b"", page) == 0
    assert page == OLD
    assert xbzrle.encode(b"", b"") == b""
    assert xbzrle.decode(b"", bytearray()) == 0


@QUICK
@given(
    old=st.binary(min_size=1, max_size=300),
    changes=st.lists(st.tuples(st.integers(0, 299), st.binary(max_size=40)), max_size=6),
    limit=st.none() | st.integers(0, 320),
)
def test_encode_gives_the_bytes_of_the_format_within_the_limit(old, changes, limit):
    new = bytearray(old)
    for at, data in changes:
        new[at : at + len(data)] = data[: max(len(old) - at, 0)]
    new = bytes(new[: len(old)])
    encoding = xbzrle.encode(old, new, limit)
    assert encoding == oracle.encode(old, new, len(new) if limit is None else limit)
    if encoding is not None:
        assert type(encoding) is bytes
        page = bytearray(old)
        xbzrle.decode(encoding, page)
        assert page == new


def test_the_limit_may_be_more_or_less_than_a_page():
    old, new = bytes(1000), b"\1" * 1000
    assert xbzrle.encode(old, new) is None
    assert xbzrle.encode(old, new, 1002) is None
    assert xbzrle.encode(old, new, 1003) == b"\x00\xe8\x07" + new
    assert xbzrle.encode(old, new, limit=5000) == b"\x00\xe8\x07" + new
    assert xbzrle.encode(old, bytes(999) + b"\1", 2) is None
    assert xbzrle.encode(OLD, OLD, 1) is None
    with pytest.raises(ValueError, match="negative"):
        xbzrle.encode(OLD, NEW, -1)


def test_pages_of_different_or_too_many_bytes_are_refused():
    for old, new in [(b"", b"a"), (b"a", b""), (OLD, NEW[:-1]), (bytes(70000), bytes(10))]:
        with pytest.raises(ValueError, match="bytes"):
            xbzrle.encode(old, new)
    assert xbzrle.MAX_PAGE == 65536
    large = bytearray(xbzrle.MAX_PAGE)
    assert xbzrle.encode(large, b"\1" + bytes(xbzrle.MAX_PAGE - 1)) == b"\x00\x01\x01"
    assert xbzrle.decode(b"\x00\x01\x01", large) == 1
    with pytest.raises(ValueError, match="65536"):
        xbzrle.encode(bytes(65537), bytes(65537))
    with pytest.raises(ValueError, match="65536"):
        xbzrle.decode(b"", bytearray(65537))


def test_a_large_page_whose_run_is_too_long_overflows():
    old = bytes(65536)
    for at, overflows in [(16383, False), (16384, True)]:
        new = bytes(at) + b"\1" + bytes(65535 - at)
        assert (xbzrle.encode(old, new) is None) == overflows


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (b"\x01", "ends within a run"),
        (b"\x01\x01", "ends within a run"),
        (b"\x01\x03ab", "ends within a run"),
        (b"\x01\x01a\x02", "ends within a run"),
        (b"\x01\x00a", "run of no bytes"),
        (b"\x01\x01a\x00\x01b", "run of no bytes"),
        (b"\x81\x80\x01\x01a", "more than two bytes"),
        (b"\x40\x01a", "past the end of the page"),
        (b"\x01\x40" + bytes(64), "past the end of the page"),
    ],
)
def test_what_is_no_encoding_is_an_error_that_says_why(encoding, message):
    page = bytearray(64 + 64)
    with pytest.raises(XbzrleError, match=message):
        xbzrle.decode(encoding, memoryview(page)[:64])
    assert page[64:] == bytes(64)
    assert issubclass(XbzrleError, mig.MigError)


# ---- many pages ----------------------------------------------------------------------------------


def some_pages(page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Equal, sparse, dense and wholly different pages in turn."""
    rng = np.random.default_rng(page_size)
    old = rng.integers(0, 256, (12, page_size), dtype=np.uint8)
    density = np.array([0, 0.03, 0.2, 1] * 3)[:, None]
    return old, np.where(rng.random(old.shape) < density, ~old, old)


@pytest.mark.parametrize("page_size", [64, 256, 4096, 65536])
def test_pages_come_back(page_size):
    old, new = some_pages(page_size)
    lengths, encodings = xbzrle.encode_pages(old, new, page_size)
    expected = [
        oracle.encode(a.tobytes(), b.tobytes(), page_size) for a, b in zip(old, new, strict=True)
    ]
    assert lengths.dtype == np.int32
    assert encodings.dtype == np.uint8
    assert lengths.tolist() == [xbzrle.OVERFLOW if e is None else len(e) for e in expected]
    assert encodings.tobytes() == b"".join(e or b"" for e in expected)
    pages = old.copy()
    assert xbzrle.decode_pages(encodings, lengths, pages, page_size) == len(encodings)
    whole = lengths == xbzrle.OVERFLOW
    assert (pages[~whole] == new[~whole]).all()
    assert (pages[whole] == old[whole]).all()


@READABLE
def test_encode_pages_takes_any_contiguous_buffer(kind):
    lengths, encodings = xbzrle.encode_pages(kind(OLD), kind(NEW), 1024)
    page_lengths = [
        len(xbzrle.encode(OLD[i : i + 1024], NEW[i : i + 1024])) for i in range(0, 4096, 1024)
    ]
    assert lengths.tolist() == page_lengths
    page = bytearray(OLD)
    xbzrle.decode_pages(encodings.tobytes(), lengths, page, 1024)
    assert page == NEW


@WRITTEN
def test_decode_pages_writes_any_contiguous_buffer(kind):
    pages = kind(OLD)
    used = xbzrle.decode_pages(ENCODING, np.array([len(ENCODING)], dtype=np.int32), pages)
    assert used == len(ENCODING)
    assert memoryview(pages).tobytes() == NEW


def test_pages_have_4096_bytes_unless_told():
    lengths, encodings = xbzrle.encode_pages(OLD * 2, OLD + NEW)
    assert lengths.tolist() == [0, len(ENCODING)]
    pages = bytearray(OLD * 2)
    assert xbzrle.decode_pages(encodings, lengths, pages) == len(ENCODING)
    assert pages == OLD + NEW


def test_no_pages_have_no_encodings():
    lengths, encodings = xbzrle.encode_pages(b"", b"")
    assert (len(lengths), len(encodings)) == (0, 0)
    assert xbzrle.decode_pages(b"", lengths, bytearray()) == 0


def test_pages_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        xbzrle.encode_pages(bytes(8192), bytes(4096))
    for page_size in (0, 32, 100, 4095):
        with pytest.raises(ValueError, match="power of two"):
            xbzrle.encode_pages(bytes(8192), bytes(8192), page_size)
    with pytest.raises(ValueError, match="65536"):
        xbzrle.encode_pages(bytes(1 << 17), bytes(1 << 17), 1 << 17)
    with pytest.raises(ValueError, match="do not fit"):
        xbzrle.decode_pages(b"", np.zeros(3, dtype=np.int32), bytearray(8192))
    with pytest.raises(ValueError, match="mismatch"):
        xbzrle.decode_pages(b"", np.zeros(2, dtype=np.int64), bytearray(8192))


def test_bytes_that_are_no_whole_page_are_refused():
    with pytest.raises(ValueError, match="page"):
        xbzrle.encode_pages(bytes(4096 + 100), bytes(4096) + b"\1" * 100)
    with pytest.raises(ValueError, match="page"):
        xbzrle.encode_pages(bytes(100), b"\1" * 100)


def test_decode_pages_needs_pages_that_can_be_written():
    with pytest.raises(BufferError):
        xbzrle.decode_pages(b"", np.zeros(1, dtype=np.int32), OLD)


def test_decode_pages_says_what_is_no_encoding():
    one = np.array([3, 3], dtype=np.int32)
    for encodings in (b"\x00\x01A", b"\x00\x01A\x00\x00B"):
        pages = bytearray(8192)
        with pytest.raises(XbzrleError):
            xbzrle.decode_pages(encodings, one, pages)
        assert pages == b"A" + bytes(8191)


def test_other_threads_run_while_pages_are_encoded():
    old = np.zeros(64 << 20, dtype=np.uint8)
    new = old.copy()
    new[::7] = 1
    counted = 0
    ended = threading.Event()
    started = threading.Event()

    def encode() -> None:
        started.set()
        xbzrle.encode_pages(old, new)
        ended.set()

    thread = threading.Thread(target=encode)
    thread.start()
    started.wait()
    while not ended.is_set():
        counted += 1
    thread.join()
    assert counted > 100


# ---- the cache -----------------------------------------------------------------------------------


def test_a_sender_and_a_receiver_agree():
    cache = mig.XbzrleCache(1 << 20)
    rng = np.random.default_rng(1)
    guest = rng.integers(0, 256, 100 * 4096, dtype=np.uint8)
    replica = guest.copy()
    out = np.empty(50 * 4096, dtype=np.uint8)
    assert cache.insert_pages(guest, range(100), 0) == 100
    for generation in range(1, 6):
        dirty = np.sort(rng.choice(100, 30, replace=False))
        for i in dirty[::2].tolist():
            at = i * 4096 + int(rng.integers(4000))
            guest[at : at + 90] += 1
        results, used = cache.encode(guest, dirty, generation, out)
        assert len(results) == 30
        encoded = np.zeros(100, dtype=np.int32)
        encoded[dirty] = results
        assert xbzrle.decode_pages(out[:used], encoded, replica) == used
        assert replica.tobytes() == guest.tobytes()
    assert cache.hits == 150
    assert cache.unchanged == cache.encoded_pages == 75
    assert (cache.misses, cache.overflows) == (0, 0)


@READABLE
def test_the_cache_takes_pages_from_any_contiguous_buffer(kind):
    cache = mig.XbzrleCache(8 * 1024, 1024)
    out = np.empty(4096, dtype=np.uint8)
    assert cache.insert_pages(kind(OLD), range(4), 0) == 4
    cache.encode(kind(NEW), np.arange(4), 1, out)
    assert b"".join(cache.page(i * 1024) for i in range(4)) == NEW


def test_the_cache_takes_indexes_of_any_kind():
    for index in (range(4), [0, 1, 2, 3], np.arange(4, dtype=np.uint8), np.arange(8)[::2] // 2):
        cache = mig.XbzrleCache(8 * 1024, 1024)
        assert cache.insert_pages(OLD, index, 0) == 4
        assert cache.used == 4


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, mapped])
def test_one_page_is_inserted_and_copied(kind):
    cache = mig.XbzrleCache(1 << 20)
    page = kind(OLD)
    assert cache.insert(8192, page, 0)
    assert cache.lookup(8192, 0)
    assert not cache.lookup(0, 0)
    copy = cache.page(8192)
    assert type(copy) is bytes
    assert copy == OLD
    assert cache.insert(8192, None, 0)
    assert cache.page(8192) == bytes(4096)
    assert copy == OLD
    assert cache.page(0) is None


@pytest.mark.parametrize(
    "kind", [bytearray, mapped, lambda data: np.frombuffer(bytearray(data), np.uint8)]
)
def test_encodings_go_into_any_writable_buffer(kind):
    cache = mig.XbzrleCache(1 << 20)
    cache.insert(0, OLD, 0)
    out = kind(bytes(4096))
    results, used = cache.encode(NEW, [0], 1, out)
    assert results.tolist() == [used] == [len(ENCODING)]
    assert memoryview(out)[:used].tobytes() == ENCODING


def test_a_cache_has_4096_byte_pages_unless_told():
    cache = mig.XbzrleCache(64 << 20)
    assert (cache.page_size, cache.npages, cache.nbytes) == (4096, 16384, 64 << 20)
    for name in ("hits", "misses", "unchanged", "overflows", "encoded_pages", "encoded_bytes"):
        assert getattr(cache, name) == 0
        with pytest.raises(AttributeError):
            setattr(cache, name, 1)


@pytest.mark.parametrize("nbytes", ["1M", 4096.0, None])
def test_a_size_is_an_integer(nbytes):
    with pytest.raises(TypeError):
        mig.XbzrleCache(nbytes)
