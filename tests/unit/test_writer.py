"""StreamWriter: everything arrives, in order, whatever the queue holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ram
from reference.ram import Record

from mig import _core
from mig.errors import ChannelError
from mig.stream.writer import StreamWriter

PAGE = 64


class Collector:
    """A sink that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent = b""
        self.sends = 0

    def send(self, out: _core.OutQueue) -> int:
        data = out.tobytes()
        out.clear()
        self.sent += data
        self.sends += 1
        return len(data)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.integers(4090, 300_000),
            st.lists(st.integers(0, 19), max_size=80),
            st.none(),
        ),
        max_size=12,
    )
)
def test_bytes_and_pages_arrive_in_order(steps):
    sink = Collector()
    writer = StreamWriter(sink)
    memory = b"".join(bytes([i + 1]) * PAGE for i in range(20))
    pages, expected = _core.Pages(memory, PAGE), b""
    for step in steps:
        if step is None:
            writer.flush()
        elif isinstance(step, list):
            writer.put_pages(pages, b"a", np.array(step, dtype=np.uint64), None)
            records = [Record(b"a", i, memory[i * PAGE : (i + 1) * PAGE]) for i in step]
            expected += ram.encode(records, PAGE)
        else:
            data = step if isinstance(step, bytes) else bytes(range(251)) * (step // 251)
            writer.put(data)
            expected += data
        assert writer.offset == len(expected)
    writer.flush()
    assert sink.sent == expected
    assert writer.offset == len(expected)


def test_more_pages_than_the_queue_holds_are_one_run_of_records():
    n = 9000
    memory = bytes(range(1, 65)) * n
    order = np.arange(n, dtype=np.uint64)
    zero = _core.Bitmap(n)
    for i in range(0, n, 3):
        zero.set(i)
    sink = Collector()
    writer = StreamWriter(sink)
    writer.put_pages(_core.Pages(memory, PAGE), b"pc.ram", order, zero)
    assert sink.sends > 1
    writer.flush()
    contents = memory[:PAGE]
    parts, current = [], None
    for i in range(n):
        record = Record(b"pc.ram", i, contents if i % 3 else 0)
        parts.append(ram.encode_record(record, PAGE, current))
        current = b"pc.ram"
    assert sink.sent == b"".join(parts)


def test_nothing_is_sent_when_nothing_is_queued():
    sink = Collector()
    writer = StreamWriter(sink)
    writer.flush()
    writer.put(b"")
    writer.flush()
    assert (sink.sends, writer.offset) == (0, 0)


def test_bytes_wait_for_flush():
    sink = Collector()
    writer = StreamWriter(sink)
    writer.put(b"abc")
    assert (sink.sent, writer.offset) == (b"", 3)
    writer.flush()
    assert (sink.sent, writer.offset) == (b"abc", 3)


def test_pages_are_free_once_they_are_sent():
    pages = _core.Pages(bytearray(b"\1" * PAGE), PAGE)
    writer = StreamWriter(Collector())
    writer.put_pages(pages, b"a", np.array([0], dtype=np.uint64), None)
    with pytest.raises(BufferError):
        pages.release()
    writer.flush()
    pages.release()


def test_an_error_of_the_sink_passes_through():
    class Broken(Collector):
        def send(self, out):
            raise ChannelError("broken")

    writer = StreamWriter(Broken())
    writer.put(b"x")
    with pytest.raises(ChannelError, match="broken"):
        writer.flush()
