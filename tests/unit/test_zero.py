"""The public faces of zero-page detection: mig.is_zero and mig.zero_pages."""

from __future__ import annotations

import array
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import zeropage

import mig

#: page 1 is the only one that is not zero
THREE = bytes(4096) + bytes(4000) + b"\1" + bytes(95) + bytes(4096)


def readonly(data: bytes) -> np.ndarray:
    view = np.frombuffer(data, dtype=np.uint8)
    assert not view.flags.writeable
    return view


def mapped(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


FORMS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "a slice of a memoryview": lambda data: memoryview(b"\xff" + data)[1:],
    "a memoryview of two dimensions": lambda data: memoryview(data).cast("B", (3, 4096)),
    "mmap": mapped,
    "array.array": lambda data: array.array("Q", data),
    "numpy": lambda data: np.frombuffer(data, dtype=np.uint8).copy(),
    "numpy, read-only": readonly,
    "numpy, two dimensions": lambda data: np.frombuffer(data, dtype=np.uint8).reshape(3, 4096),
    "numpy, words": lambda data: np.frombuffer(data, dtype="<u8"),
    "numpy, words in three dimensions": lambda data: np.frombuffer(data, dtype="<u8").reshape(
        3, 8, 64
    ),
}


# ---- is_zero ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_is_zero_takes_every_contiguous_buffer(form):
    assert mig.is_zero(FORMS[form](bytes(3 * 4096))) is True
    assert mig.is_zero(FORMS[form](THREE)) is False


def test_no_bytes_at_all_are_zero():
    assert mig.is_zero(b"")
    assert mig.is_zero(np.empty(0))


@given(st.binary(max_size=600))
@settings(max_examples=100, deadline=None)
def test_is_zero_agrees_with_the_oracle(data):
    assert mig.is_zero(data) == zeropage.is_zero(data)


def test_is_zero_looks_at_bytes_and_not_at_numbers():
    assert not mig.is_zero(np.array([-0.0]))
    assert mig.is_zero(np.zeros(3, dtype=complex))


@pytest.mark.parametrize("strided", [memoryview(bytes(64))[::2], np.zeros((8, 8))[:, ::2]])
def test_is_zero_refuses_what_is_not_contiguous(strided):
    with pytest.raises((BufferError, ValueError)):
        mig.is_zero(strided)


@pytest.mark.parametrize("no_buffer", [None, 0, "text", [0, 0]])
def test_is_zero_refuses_what_is_no_buffer(no_buffer):
    with pytest.raises(TypeError):
        mig.is_zero(no_buffer)


# ---- zero_pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_zero_pages_takes_every_contiguous_buffer(form):
    data = FORMS[form](THREE)
    bitmap, count = mig.zero_pages(data)
    assert isinstance(bitmap, mig.Bitmap)
    assert (len(bitmap), bitmap.indexes().tolist(), count) == (3, [0, 2], 2)
    bitmap, count = mig.zero_pages(data, index=[1, 2])
    assert (len(bitmap), bitmap.indexes().tolist(), count) == (2, [1], 1)


@pytest.mark.parametrize("page_size", [1 << bits for bits in range(6, 22)])
def test_pages_of_64_bytes_to_2_mib(page_size):
    data = bytearray(5 * page_size)
    data[page_size] = 1
    data[4 * page_size - 1] = 1
    bitmap, count = mig.zero_pages(data, page_size)
    assert (len(bitmap), bitmap.indexes().tolist(), count) == (5, [0, 2, 4], 3)
    bitmap, count = mig.zero_pages(data, page_size, [4, 3, 0, 1])
    assert (len(bitmap), bitmap.indexes().tolist(), count) == (4, [0, 2], 2)


@given(data=st.data(), page_size=st.sampled_from([64, 256, 1024]))
@settings(max_examples=100, deadline=None)
def test_zero_pages_agrees_with_the_oracle(data, page_size):
    shapes = [bytes(page_size), bytes(page_size - 1) + b"\1", b"\1" + bytes(page_size - 1)]
    pages = data.draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=100))
    memory = b"".join(pages)
    bitmap, count = mig.zero_pages(memory, page_size)
    expected = zeropage.zero_pages(pages, range(len(pages)))
    assert (list(bitmap), count) == (expected, sum(expected))
    index = data.draw(st.lists(st.integers(0, len(pages) - 1), max_size=100))
    bitmap, count = mig.zero_pages(memory, page_size, index)
    expected = zeropage.zero_pages(pages, index)
    assert (list(bitmap), count) == (expected, sum(expected))


def test_no_pages_are_no_zero_pages():
    for bitmap, count in (mig.zero_pages(b""), mig.zero_pages(THREE, index=[])):
        assert (len(bitmap), count) == (0, 0)


def test_the_same_page_may_be_asked_for_again_and_in_any_order():
    bitmap, count = mig.zero_pages(THREE, index=[2, 1, 2, 0, 1, 1])
    assert (bitmap.indexes().tolist(), count) == ([0, 2, 3], 3)


@pytest.mark.parametrize(
    "index",
    [
        [0, 1],
        (0, 1),
        range(2),
        np.array([0, 1]),
        np.array([0, 1], dtype=np.uint8),
        np.array([0, 9, 1, 9], dtype=np.uint64)[::2],
    ],
)
def test_index_is_any_list_of_numbers(index):
    bitmap, count = mig.zero_pages(THREE, index=index)
    assert (bitmap.indexes().tolist(), count) == ([0], 1)


def test_index_may_be_what_a_bitmap_lists():
    dirty = mig.Bitmap(3)
    dirty.set(1, 2)
    bitmap, count = mig.zero_pages(THREE, index=dirty.indexes())
    assert (bitmap.indexes().tolist(), count) == ([1], 1)


@pytest.mark.parametrize("nbytes", [1, 63, 64, 4095, 4097, 3 * 4096 - 1, 3 * 4096 + 1])
def test_a_piece_of_a_page_is_refused(nbytes):
    with pytest.raises(ValueError, match=f"{nbytes} bytes are not a whole number of pages of 4096"):
        mig.zero_pages(bytes(nbytes))
    with pytest.raises(ValueError, match="whole number of pages"):
        mig.zero_pages(bytes(nbytes), index=[])


def test_whole_pages_are_counted_in_bytes_and_not_in_items():
    bitmap, count = mig.zero_pages(np.zeros(512, dtype=np.uint64))
    assert (len(bitmap), count) == (1, 1)
    with pytest.raises(ValueError, match="32768 bytes are not"):
        mig.zero_pages(np.zeros(4096, dtype=np.uint64), 1 << 16)


@pytest.mark.parametrize("page_size", [0, 1, 32, 63, 65, 96, 4095, 4097, 3 * 4096])
def test_a_page_size_that_cannot_be_is_refused(page_size):
    with pytest.raises(ValueError, match="power of two"):
        mig.zero_pages(bytes(12288), page_size)
    with pytest.raises(ValueError, match="power of two"):
        mig.zero_pages(bytes(12288), page_size, [0])


@pytest.mark.parametrize("index", [[3], [0, 3], [3, 0], [2**63], [2**64 - 1]])
def test_a_page_that_is_not_in_the_buffer_is_refused(index):
    with pytest.raises(IndexError):
        mig.zero_pages(THREE, index=index)


@pytest.mark.parametrize("index", [[-1], np.array([-1]), np.array([0, -3])])
def test_a_negative_page_is_not_in_the_buffer(index):
    # numpy refuses to turn a negative number of a list into an unsigned one itself
    with pytest.raises((IndexError, OverflowError)):
        mig.zero_pages(THREE, index=index)


def test_index_of_two_dimensions_is_refused():
    with pytest.raises(ValueError, match="dimensions"):
        mig.zero_pages(THREE, index=[[0, 1]])


@pytest.mark.parametrize(
    "strided", [memoryview(bytes(8192))[::2], np.zeros((64, 128), dtype=np.uint8)[:, ::2]]
)
def test_zero_pages_refuses_what_is_not_contiguous(strided):
    with pytest.raises((BufferError, ValueError)):
        mig.zero_pages(strided)


def test_columns_first_is_not_contiguous_in_the_order_of_pages():
    with pytest.raises((BufferError, ValueError)):
        mig.zero_pages(np.zeros((64, 128), dtype=np.uint8, order="F"))


@pytest.mark.parametrize("no_buffer", [None, 4096, "text", [0] * 4096])
def test_zero_pages_refuses_what_is_no_buffer(no_buffer):
    with pytest.raises(TypeError):
        mig.zero_pages(no_buffer)


def test_the_buffer_is_free_again_afterwards():
    memory, data = mmap.mmap(-1, 8192), bytearray(8192)
    assert mig.zero_pages(memory)[1] == mig.zero_pages(data)[1] == 2
    memory.close()
    data.clear()


def test_the_zero_pages_of_a_file(tmp_path: Path):
    path = tmp_path / "memory"
    path.write_bytes(THREE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        bitmap, count = mig.zero_pages(memory)
    assert (bitmap.indexes().tolist(), count) == ([0, 2], 2)


def test_pages_that_others_are_writing_do_no_harm():
    page_size = 1 << 18
    data = np.zeros((16, page_size), dtype=np.uint8)
    data[9, 77] = 1
    stop, writing = threading.Event(), threading.Event()

    def write(page: int) -> None:
        value = 1
        while not stop.is_set():
            data[page] = value
            value ^= 1
            writing.set()

    writers = [threading.Thread(target=write, args=(page,)) for page in (4, 12)]
    for writer in writers:
        writer.start()
    try:
        writing.wait()
        for _ in range(30):
            bitmap, count = mig.zero_pages(data, page_size)
            steady = [page for page in bitmap.indexes().tolist() if page not in (4, 12)]
            assert steady == [page for page in range(16) if page not in (4, 9, 12)]
            assert count == bitmap.count()
    finally:
        stop.set()
        for writer in writers:
            writer.join()


@pytest.mark.parametrize("index", [[True, False, True], np.array([0.0, 1.0]), ["a"]])
def test_page_numbers_are_integers(index):
    with pytest.raises(TypeError, match="page numbers are integers"):
        mig.zero_pages(THREE, index=index)
