"""Streams with bytes flipped, inserted, deleted or copied: they load, or raise a MigError."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from faults import streams
from faults.streams import Guest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mig
from mig.errors import IdleTimeoutError, MigError, StreamError

STREAM = streams.sample()
WHOLE = STREAM.encode()
KEYS = (
    *("devices", "fields", "subsections", "name", "instance_id", "version", "size", "array_len"),
    *("page_size", "vmsd_name"),
)
#: where mutations hurt: everything but pages' contents
TENDER = sorted(
    at
    for label, data in STREAM.fields
    for at in range(STREAM.offset(label), STREAM.end(label))
    if len(data) < streams.PAGE
)
# hypothesis finds what it finds once; a suite must say the same every time
MANY = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Edit:
    at: int
    delete: int
    insert: bytes

    def apply(self, data: bytes) -> bytes:
        at = self.at % (len(data) + 1)
        return data[:at] + self.insert + data[at + self.delete :]


def edits() -> st.SearchStrategy[list[Edit]]:
    interesting = st.sampled_from(
        [bytes([n]) for n in (0, 1, 2, 4, 6, 7, 8, 16, 32, 0x7E, 0x7F, 0x80, 0xFF)]
        + [b"\xff" * 4, b"\xff" * 8, b"\0\x06", b"\x7e\0\0\0\x01", STREAM["pc.ram 0 word"]]
    )
    one = st.builds(
        Edit,
        at=st.sampled_from(TENDER) | st.integers(0, len(WHOLE)),
        delete=st.sampled_from([0, 0, 1, 1, 1, 2, 4, 8, 100, 1100]),
        insert=interesting | st.binary(max_size=12) | st.just(b""),
    )
    return st.lists(one, min_size=1, max_size=4)


def mutate(changes: list[Edit]) -> bytes:
    data = WHOLE
    for change in changes:
        data = change.apply(data)
    return data


def flip(label: str, data: bytes) -> list[Edit]:
    return [Edit(STREAM.offset(label), len(data), data)]


def check(error: BaseException | None, nbytes: int) -> None:
    assert error is None or isinstance(error, MigError)
    # not something that the engine had to wrap
    assert type(error) is not MigError, repr(error.__cause__)  # type: ignore[union-attr]
    if isinstance(error, StreamError) and error.offset is not None:
        assert 0 <= error.offset <= nbytes


@MANY
@given(changes=edits())
@example(changes=flip("description text", b'{"devices": [{"name":"a","instance_id":1e999}]}'))
@example(changes=flip("end eos", b"\xff" * 8))
def test_image(changes: list[Edit]) -> None:
    data = mutate(changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vm.mig")
        path.write_bytes(data)
        try:
            with mig.open_image(path) as image:
                for block in image.blocks:
                    assert block.data + block.zero + block.missing == (
                        block.used_length // image.page_size
                    )
                image.source_blocks()
        except MigError as error:
            check(error, len(data))


@MANY
@given(changes=edits())
def test_capture(changes: list[Edit]) -> None:
    """What is captured is what the original holds; what is refused leaves nothing."""
    data = mutate(changes)
    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder, "source"), Path(folder, "vm.mig")
        source.write_bytes(data)
        migration = mig.IncomingMigration(mig.StreamCapture(path), parameters={"idle-timeout": 10})
        migration.listen(f"file:{source}")
        error = streams.outcome(migration)
        assert not isinstance(error, IdleTimeoutError)
        check(error, len(data))
        if error is not None:
            assert [p.name for p in Path(folder).iterdir()] == ["source"]
            return
        with mig.open_image(source) as original, mig.open_image(path) as kept:
            assert original.blocks == kept.blocks
            assert original.device_state.raw == kept.device_state.raw
            assert original.devices == kept.devices
            for block in original.blocks:
                for i in range(min(64, block.data + block.zero + block.missing)):
                    assert original.page(block.idstr, i) == kept.page(block.idstr, i)


@MANY
@given(changes=edits())
def test_memory(changes: list[Edit]) -> None:
    data = mutate(changes)
    with tempfile.TemporaryDirectory() as folder, Guest(empty=True) as guest:
        source = Path(folder, "source")
        source.write_bytes(data)
        migration = mig.IncomingMigration(guest.guest, parameters={"idle-timeout": 10})
        migration.listen(f"file:{source}")
        check(streams.outcome(migration), len(data))


@settings(MANY, max_examples=120)
@given(
    text=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(KEYS),
                inner,
                max_size=5,
            )
        ),
    ).map(lambda value: {"devices": [value]})
)
def test_description(text: object) -> None:
    """Any JSON as description: QEMU would not even look at it."""
    data = WHOLE[: STREAM.offset("description")] + streams.description(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vm.mig")
        path.write_bytes(data)
        check(streams.image_error(path), len(data))
