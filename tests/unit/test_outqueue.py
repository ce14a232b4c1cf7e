"""OutQueue: records in wire order, resumed where there was no room."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram
from reference.ram import Record

from mig import _core

PAGE = 64


def index(pages: list[int]) -> np.ndarray:
    return np.array(pages, dtype=np.uint64)


def zero_bits(flags: list[bool]) -> _core.Bitmap:
    bitmap = _core.Bitmap(len(flags))
    for i, flag in enumerate(flags):
        if flag:
            bitmap.set(i)
    return bitmap


def contents(page: int) -> bytes:
    return bytes([page % 255 + 1]) * PAGE


def send_all(
    pages: _core.Pages, name: bytes | None, order: np.ndarray, zero: _core.Bitmap | None, **sizes
) -> tuple[bytes, int]:
    """Encode with a small queue, emptying it whenever it is full; bytes and number of queues."""
    out, sent, first, turns = _core.OutQueue(**sizes), b"", 0, 0
    while True:
        done = out.encode(pages, name, order, first, zero)
        assert first <= done <= len(order)
        assert out.nbytes == len(out.tobytes())
        sent += out.tobytes()
        out.clear()
        turns += 1
        if done == len(order):
            return sent, turns
        assert done > first, "an empty queue has room for a record"
        first, name = done, None


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    name=st.none() | st.binary(min_size=1, max_size=255),
    max_iov=st.sampled_from([4, 5, 16, 1024]),
    arena_size=st.sampled_from([1024, 1100, 1 << 16]),
)
def test_records_are_those_of_the_oracle_whatever_the_room(data, name, max_iov, arena_size):
    order = data.draw(st.lists(st.integers(0, 40), max_size=120))
    flags = data.draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
    pages = _core.Pages(b"".join(contents(i) for i in range(41)), PAGE)
    sent, _ = send_all(
        pages, name, index(order), zero_bits(flags), max_iov=max_iov, arena_size=arena_size
    )
    block = b"x" if name is None else name
    records = [
        Record(block, page, 0 if flag else contents(page))
        for page, flag in zip(order, flags, strict=True)
    ]
    assert sent == ram.encode(records, PAGE, block if name is None else None)


def test_a_full_arena_stops_the_encoder_and_first_goes_on():
    pages, order = _core.Pages(bytes(PAGE), PAGE), index([0] * 1000)
    zero = _core.Bitmap(1000, fill=True)
    out = _core.OutQueue(max_iov=1024, arena_size=1024)
    done = out.encode(pages, b"a", order, 0, zero)
    assert 0 < done < 1000
    assert out.niov == 1
    assert out.encode(pages, None, order, done, zero) == done
    sent, turns = send_all(pages, b"a", order, zero, max_iov=1024, arena_size=1024)
    assert turns > 1
    assert sent == ram.encode([Record(b"a", 0, 0)] * 1000, PAGE)


def test_full_iovecs_stop_the_encoder_and_first_goes_on():
    pages, order = _core.Pages(contents(0) + contents(1), PAGE), index([1, 0] * 50)
    out = _core.OutQueue(max_iov=8, arena_size=1 << 16)
    assert out.encode(pages, None, order) == 4
    assert out.niov == 8
    assert out.encode(pages, None, order, 4) == 4
    out.clear()
    assert (out.niov, out.nbytes) == (0, 0)
    assert out.encode(pages, None, order, 4) == 8


def test_bits_of_zero_belong_to_positions_in_index_not_to_pages():
    pages = _core.Pages(contents(0) + contents(1) + contents(2), PAGE)
    zero = zero_bits([False, False, True])
    out = _core.OutQueue()
    out.encode(pages, None, index([2, 1, 0]), 1, zero)
    records = [Record(b"a", 1, contents(1)), Record(b"a", 0, 0)]
    assert out.tobytes() == ram.encode(records, PAGE, b"a")


def test_zero_bits_past_the_first_word():
    pages = _core.Pages(contents(0), PAGE)
    flags = [i in (63, 64, 130) for i in range(131)]
    out = _core.OutQueue()
    assert out.encode(pages, None, index([0] * 131), 60, zero_bits(flags)) == 131
    records = [Record(b"a", 0, 0 if flag else contents(0)) for flag in flags]
    assert out.tobytes() == ram.encode(records[60:], PAGE, b"a")


def test_a_zero_bitmap_may_be_longer_but_not_shorter():
    pages, out = _core.Pages(contents(0), PAGE), _core.OutQueue()
    assert out.encode(pages, None, index([0]), 0, _core.Bitmap(2)) == 1
    with pytest.raises(ValueError, match="fewer bits"):
        out.encode(pages, None, index([0, 0]), 0, _core.Bitmap(1))


def test_pages_without_storage_are_zero_records():
    where = np.array([_core.PAGE_ZERO, _core.PAGE_NONE, 8], dtype=np.int64)
    out = _core.OutQueue()
    out.encode(_core.Pages(b"h" * 8 + contents(5), PAGE, where=where), b"a", index([0, 1, 2]))
    records = [Record(b"a", 0, 0), Record(b"a", 1, 0), Record(b"a", 2, contents(5))]
    assert out.tobytes() == ram.encode(records, PAGE)


# ---- headers that stand in the file already --------------------------------------------------


def file_of(records: list[Record]) -> tuple[bytes, np.ndarray]:
    """A file of records of one block and where its pages are."""
    file, current, where = b"prologue", None, {}
    for record in records:
        file += ram.encode_record(record, PAGE, current)
        current = record.block
        where[record.page] = len(file) - PAGE
    return file, np.array([where[i] for i in sorted(where)], dtype=np.int64)


def test_a_run_of_records_in_a_file_goes_out_in_one_piece():
    records = [Record(b"a", i, contents(i)) for i in range(10)]
    file, where = file_of(records)
    out = _core.OutQueue()
    out.encode(_core.Pages(file, PAGE, where=where), b"a", index(list(range(10))))
    assert out.tobytes() == ram.encode(records, PAGE)
    # the naming header, the first page and behind it all the rest as it stands
    assert out.niov == 2


@pytest.mark.parametrize("order", [[3, 1, 2], [9, 8, 7], [0, 5, 6, 0]])
def test_records_taken_from_a_file_in_any_order_are_right(order):
    file, where = file_of([Record(b"a", i, contents(i)) for i in range(10)])
    for name, current in ((b"b", None), (None, b"b")):
        out = _core.OutQueue()
        out.encode(_core.Pages(file, PAGE, where=where), name, index(order))
        records = [Record(b"b", i, contents(i)) for i in order]
        assert out.tobytes() == ram.encode(records, PAGE, current)


def test_a_header_that_is_not_the_right_one_is_made_anew():
    """The bytes before a page may be the header of another page, or end in a name."""
    file, where = file_of([Record(b"a", i, contents(i)) for i in range(3)])
    swapped = where[[1, 0, 2]]
    out = _core.OutQueue()
    out.encode(_core.Pages(file, PAGE, where=swapped), None, index([0, 1, 2]))
    records = [Record(b"a", i, contents(j)) for i, j in enumerate([1, 0, 2])]
    assert out.tobytes() == ram.encode(records, PAGE, b"a")


@pytest.mark.parametrize("place", range(1, 10))
def test_pages_near_the_start_of_a_file_are_not_looked_at_before_it(place):
    where = np.array([place], dtype=np.int64)
    file = bytes(place) + contents(3)
    out = _core.OutQueue()
    out.encode(_core.Pages(file, PAGE, where=where), None, index([0]))
    assert out.tobytes() == ram.encode([Record(b"a", 0, contents(3))], PAGE, b"a")


def test_a_page_known_to_be_zero_is_not_taken_from_the_file():
    file, where = file_of([Record(b"a", 0, contents(0)), Record(b"a", 1, bytes(PAGE))])
    out = _core.OutQueue()
    zero = zero_bits([False, True])
    out.encode(_core.Pages(file, PAGE, where=where), None, index([0, 1]), 0, zero)
    records = [Record(b"a", 0, contents(0)), Record(b"a", 1, 0)]
    assert out.tobytes() == ram.encode(records, PAGE, b"a")


# ---- plain bytes -----------------------------------------------------------------------------


def test_bytes_are_copied_in_order_with_records():
    data = bytearray(b"head")
    pages, out = _core.Pages(contents(0), PAGE), _core.OutQueue()
    assert out.put(data)
    data[:] = b"gone"
    out.encode(pages, None, index([0]))
    assert out.put(b"tail")
    record = ram.encode([Record(b"a", 0, contents(0))], PAGE, b"a")
    assert out.tobytes() == b"head" + record + b"tail"
    assert out.nbytes == len(out.tobytes())


def test_bytes_that_do_not_fit_change_nothing():
    out = _core.OutQueue(max_iov=4, arena_size=1024)
    assert out.put(b"x" * 1000)
    assert not out.put(b"y" * 25)
    assert out.put(b"z" * 24)
    assert not out.put(b"!")
    assert out.tobytes() == b"x" * 1000 + b"z" * 24
    out.clear()
    assert out.put(b"y" * 1024)


def test_bytes_after_the_last_iovec_do_not_fit():
    pages = _core.Pages(contents(0), PAGE)
    out = _core.OutQueue(max_iov=4, arena_size=1024)
    out.encode(pages, None, index([0, 0]))
    assert out.niov == 4
    assert not out.put(b"x")
    assert out.nbytes == 2 * (8 + PAGE)


def test_adjacent_bytes_share_an_iovec():
    out = _core.OutQueue()
    for _ in range(10):
        assert out.put(b"ab")
    assert (out.niov, out.tobytes()) == (1, b"ab" * 10)


def test_arguments_that_cannot_be_are_refused():
    pages, out = _core.Pages(contents(0), PAGE), _core.OutQueue()
    with pytest.raises(ValueError, match="256 bytes"):
        out.encode(pages, b"x" * 256, index([0]))
    with pytest.raises(IndexError):
        out.encode(pages, None, index([1]))
    with pytest.raises(ValueError, match="4 iovecs"):
        _core.OutQueue(max_iov=3)
    with pytest.raises(ValueError, match="1024 bytes"):
        _core.OutQueue(arena_size=1023)
    assert out.nbytes == 0
    pages.release()


def test_encoding_nothing_is_done_at_once():
    out = _core.OutQueue()
    pages = _core.Pages(contents(0), PAGE)
    assert out.encode(pages, b"a", index([])) == 0
    assert out.encode(pages, b"a", index([0]), 1) == 1
    assert out.encode(pages, b"a", index([0]), 7) == 1
    assert out.nbytes == 0


def test_the_longest_name_fits_into_the_smallest_arena():
    out = _core.OutQueue(max_iov=4, arena_size=1024)
    assert out.encode(_core.Pages(contents(0), PAGE), b"n" * 255, index([0])) == 1
    assert out.tobytes() == ram.encode([Record(b"n" * 255, 0, contents(0))], PAGE)
