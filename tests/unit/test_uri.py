"""URIs: every form, and what is wrong with those that are none."""

from __future__ import annotations

import pytest

from mig.channel import parse_uri
from mig.channel.uri import ExecUri, FdUri, FileUri, TcpUri, UnixUri
from mig.errors import OptionError, UriError


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("tcp:host:4444", TcpUri("host", 4444)),
        ("tcp:127.0.0.1:0", TcpUri("127.0.0.1", 0)),
        ("tcp::65535", TcpUri("", 65535)),
        ("tcp:[::1]:1", TcpUri("::1", 1)),
        ("unix:/tmp/s", UnixUri("/tmp/s")),
        ("unix:a:b", UnixUri("a:b")),
        ("fd:0", FdUri(0)),
        ("fd:17", FdUri(17)),
        ("exec:gzip -c > 'a:b'", ExecUri("gzip -c > 'a:b'")),
        ("file:vm.mig", FileUri("vm.mig")),
        ("file:/a,b:c", FileUri("/a,b:c")),
        ("file:a,offset=16", FileUri("a", 16)),
        ("file:a,offset=0x1000", FileUri("a", 4096)),
        ("file:a,offset=1,offset=2", FileUri("a,offset=1", 2)),
    ],
)
def test_uris_are_read_and_read_again_from_their_text(text, uri):
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not a migration URI"),
        ("vm.mig", "not a migration URI"),
        (":", "scheme '' is not known"),
        ("http://x", "scheme 'http' is not known"),
        ("TCP:a:1", "scheme 'TCP' is not known"),
        ("tcp:", "tcp:HOST:PORT"),
        ("tcp:host", "tcp:HOST:PORT"),
        ("tcp:host:", "tcp:HOST:PORT"),
        ("tcp:host:x", "tcp:HOST:PORT"),
        ("tcp:host:-1", "tcp:HOST:PORT"),
        ("tcp:host:65536", "tcp:HOST:PORT"),
        ("tcp:::1:80", "in brackets"),
        ("unix:", "nothing follows unix:"),
        ("exec:", "nothing follows exec:"),
        ("file:", "nothing follows file:"),
        ("fd:", "descriptor number"),
        ("fd:x", "descriptor number"),
        ("fd:-1", "descriptor number"),
        ("file:a,offset=", "offset=N"),
        ("file:a,offset=x", "offset=N"),
        ("file:a,offset=-1", "offset=N"),
        ("file:,offset=1", "offset=N"),
    ],
)
def test_what_is_no_uri_is_refused_with_its_text(text, match):
    with pytest.raises(UriError, match=match) as caught:
        parse_uri(text)
    assert f"'{text}'" in str(caught.value)
    assert isinstance(caught.value, OptionError)
