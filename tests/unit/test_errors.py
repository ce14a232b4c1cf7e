"""The errors of mig."""

from __future__ import annotations

import inspect

import pytest

from mig import errors
from mig.errors import (
    ChannelError,
    IdleTimeoutError,
    MigError,
    MismatchError,
    OptionError,
    PeerError,
    StateError,
    StreamError,
    TruncatedError,
    UnsupportedError,
    UriError,
    XbzrleError,
)


def test_every_error_is_a_mig_error():
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    classes = [c for c in found if c.__module__ == "mig.errors"]
    assert classes
    assert all(issubclass(c, MigError) for c in classes)


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        (OptionError, ValueError),
        (UriError, OptionError),
        (IdleTimeoutError, ChannelError),
        (PeerError, ChannelError),
        (TruncatedError, StreamError),
        (UnsupportedError, StreamError),
        (MismatchError, StreamError),
        (XbzrleError, MigError),
    ],
)
def test_the_tree_is_as_documented(child, parent):
    assert issubclass(child, parent)


def test_the_description_of_the_module_names_every_error():
    for name, _ in inspect.getmembers(errors, inspect.isclass):
        assert name in (errors.__doc__ or "").split()


def test_a_stream_error_names_the_place():
    error = StreamError("bad", offset=0x1234, section="ram", block="pc.ram")
    assert str(error) == "bad (at offset 0x1234, section 'ram', block 'pc.ram')"
    assert (error.message, error.offset) == ("bad", 0x1234)


def test_a_stream_error_names_only_what_it_knows():
    assert str(StreamError("bad")) == "bad"
    assert str(StreamError("bad", offset=0)) == "bad (at offset 0x0)"
    assert str(StreamError("bad", section="ram")) == "bad (at section 'ram')"


def test_an_unsupported_error_names_the_capability_to_switch_off():
    error = UnsupportedError("no", capability="xbzrle", offset=1)
    assert "switch off capability 'xbzrle' at the source" in str(error)
    assert error.capability == "xbzrle"
    assert str(UnsupportedError("no")) == "no"


def test_an_option_error_lists_every_violation():
    error = OptionError("a", "b")
    assert (error.violations, str(error)) == (("a", "b"), "a; b")


def test_a_state_error_knows_status_and_input():
    error = StateError("active", "start")
    assert (error.status, error.input) == ("active", "start")
    assert "active" in str(error)
