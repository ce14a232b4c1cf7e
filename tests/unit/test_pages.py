"""Page arithmetic, and the pinned pages of a block."""

from __future__ import annotations

import numpy as np
import pytest

from mig import _core
from mig.pages import check_page_size

SIZES = [1 << bits for bits in range(6, 17)]


def places(*where: int) -> np.ndarray:
    return np.array(where, dtype=np.int64)


def index(*pages: int) -> np.ndarray:
    return np.array(pages, dtype=np.uint64)


@pytest.mark.parametrize("page_size", [1 << bits for bits in range(10, 21)])
def test_powers_of_two_are_page_sizes(page_size):
    assert check_page_size(page_size) == page_size


@pytest.mark.parametrize("page_size", [-4096, -1, 0, 1, 512, 4095, 4097, 3 * 4096, 1 << 21])
def test_other_numbers_are_no_page_sizes(page_size):
    with pytest.raises(ValueError, match="power of two"):
        check_page_size(page_size)


@pytest.mark.parametrize("page_size", SIZES)
def test_pages_of_every_size_are_sent_from_where_they_are(page_size):
    data = b"".join(bytes([i + 1]) * page_size for i in range(3))
    pages = _core.Pages(data, page_size)
    assert (pages.npages, pages.page_size, pages.writable) == (3, page_size, False)
    out = _core.OutQueue()
    assert out.encode(pages, None, index(2, 0)) == 2
    sent = out.tobytes()
    assert sent[8 : 8 + page_size] == data[2 * page_size :]
    assert sent[-page_size:] == data[:page_size]


@pytest.mark.parametrize("page_size", [0, 1, 32, 65, 4095, 3 * 64])
def test_pages_refuse_a_page_size_that_cannot_be(page_size):
    with pytest.raises(ValueError, match="power of two"):
        _core.Pages(bytes(8192), page_size)


def test_a_piece_of_a_page_is_refused():
    with pytest.raises(ValueError, match="191 bytes are not a whole number of pages of 64"):
        _core.Pages(bytes(64 * 3 - 1), 64)


def test_only_writable_memory_can_be_pinned_for_writing():
    assert _core.Pages(bytearray(64), 64, writable=True).writable
    with pytest.raises(BufferError):
        _core.Pages(bytes(64), 64, writable=True)


def test_memory_stays_pinned_until_release():
    data = bytearray(64)
    pages = _core.Pages(data, 64)
    with pytest.raises(BufferError):
        data.append(1)
    pages.release()
    data.append(1)
    assert pages.npages == 0


def test_release_twice_is_one_release():
    pages = _core.Pages(bytearray(64), 64)
    pages.release()
    pages.release()
    assert pages.npages == 0


def test_pages_in_a_queue_cannot_be_released():
    data = bytearray(b"\1" * 64)
    pages, out = _core.Pages(data, 64), _core.OutQueue()
    out.encode(pages, b"a", index(0))
    with pytest.raises(BufferError, match="in use"):
        pages.release()
    assert pages.npages == 1
    out.clear()
    pages.release()
    data.append(1)


def test_pages_queued_twice_are_released_after_both():
    pages, first, second = _core.Pages(bytes(64), 64), _core.OutQueue(), _core.OutQueue()
    first.encode(pages, b"a", index(0))
    second.encode(pages, b"a", index(0))
    first.clear()
    with pytest.raises(BufferError):
        pages.release()
    second.clear()
    pages.release()


def test_a_queue_that_goes_away_lets_go_of_its_pages():
    pages = _core.Pages(bytes(64), 64)
    out = _core.OutQueue()
    out.encode(pages, b"a", index(0))
    del out
    pages.release()


def test_a_queue_keeps_its_pages_alive():
    out = _core.OutQueue()
    out.encode(_core.Pages(bytearray(b"\7" * 64), 64), None, index(0))
    assert out.tobytes().endswith(b"\7" * 64)


def test_places_are_checked_against_the_data():
    data = bytes(200)
    good = places(_core.PAGE_NONE, _core.PAGE_ZERO, 1, 136, -5)
    assert _core.Pages(data, 64, where=good).npages == 5
    for bad in (137, 200, 201, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match="page 1 lies outside"):
            _core.Pages(data, 64, where=places(1, bad))


def test_places_of_less_data_than_a_page_are_refused():
    with pytest.raises(ValueError, match="page 0 lies outside"):
        _core.Pages(bytes(63), 64, where=places(1))


def test_places_must_be_64_bit_numbers():
    with pytest.raises(ValueError, match="64-bit integers"):
        _core.Pages(bytes(64), 64, where=np.array([1], dtype=np.int32))


def test_no_places_are_no_pages():
    assert _core.Pages(bytes(64), 64, where=places()).npages == 0


def test_count_stored_counts_pages_with_contents():
    pages = _core.Pages(bytes(200), 64, where=places(0, -1, 8, 100))
    assert pages.count_stored(index(0, 1, 2, 3, 3)) == 3
    assert pages.count_stored(index()) == 0
    assert _core.Pages(bytes(128), 64).count_stored(index(0, 1, 1)) == 3
    with pytest.raises(IndexError):
        pages.count_stored(index(4))
