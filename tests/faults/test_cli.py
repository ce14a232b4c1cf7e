"""The command as a process: exit status, one line on standard error, no FILE after a failure."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import streams
from faults.streams import Guest, Pieces, be32

from mig.records import Configuration

LISTENING = re.compile(r"mig: listening on unix:(\S+)\n")


def mig_command(*args: str) -> list[str]:
    # -P: the installed package, not the source tree in the working directory
    return [sys.executable, "-P", "-m", "mig", *args]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        mig_command(*args), capture_output=True, text=True, timeout=120, check=False
    )


def assert_one_line(stderr: str) -> None:
    assert re.fullmatch(r"mig: [^\n]+\n", stderr), stderr


# ---- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["receive"],
        ["receive", "tcp:127.0.0.1:0"],
        ["receive", "nonsense", "FILE"],
        ["receive", "tcp:127.0.0.1", "FILE"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-c", "warp"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-c", "x-colo"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-c", "return-path=maybe"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-p", "idle-timeout"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-p", "idle-timeout=soon"],
        ["receive", "tcp:127.0.0.1:0", "FILE", "-p", "warp=1"],
        ["receive", "tcp:127.0.0.1:0", "."],
        ["send", "IMAGE"],
        ["send", "IMAGE", "nonsense"],
        ["send", "IMAGE", "file:OUT", "-c", "pause-before-switchover"],
        ["send", "IMAGE", "file:OUT", "-c", "return-path"],
        ["send", "IMAGE", "file:OUT", "-p", "max-bandwidth=-1"],
        ["info"],
        ["info", "IMAGE", "--kernels"],
        ["info", "IMAGE", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage(stream: Pieces, args: list[str], tmp_path: Path, folder: Path) -> None:
    (tmp_path / "IMAGE").write_bytes(stream.encode())
    names = {"IMAGE": str(tmp_path / "IMAGE"), "FILE": str(folder / "vm.mig")}
    args = [names.get(arg, arg).replace("file:OUT", f"file:{tmp_path}/out") for arg in args]
    done = run(*args)
    assert done.returncode == 2, done
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("nbytes", [0, 5, 1000, 3000, 3500])
def test_receive_of_a_broken_stream(
    stream: Pieces, nbytes: int, as_json: bool, tmp_path: Path, folder: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(stream.encode()[:nbytes])
    done = run("receive", f"file:{source}", str(folder / "vm.mig"), *["--json"] * as_json)
    assert done.returncode == 1
    assert_one_line(done.stderr)
    assert list(folder.iterdir()) == []
    if as_json:
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["status"] == "failed"
        assert said["kind"] == "TruncatedError"
        assert "offset" in said["error"]
    else:
        assert done.stdout == ""


@pytest.mark.parametrize(
    "args",
    [
        ["receive", "file:/nonexistent/stream", "FILE"],
        ["receive", "unix:/nonexistent/socket", "FILE"],
        ["receive", "exec:exit 1", "FILE"],
        ["receive", "tcp:a..b:0", "FILE"],
        ["receive", "tcp:127.0.0.1:0", "FILE/x/y"],
        ["send", "/nonexistent/image", "file:OUT"],
        ["send", "file:IMAGE,offset=999999", "file:OUT"],
        ["send", "IMAGE", "unix:/nonexistent/socket"],
        ["send", "IMAGE", "exec:exit 1"],
        ["send", "IMAGE", "tcp:a..b:1"],
        ["info", "/nonexistent/image"],
        ["info", "/dev/null"],
        ["info", "/proc/self/mem"],
        ["info", "/"],
    ],
    ids=" ".join,
)
def test_failure(stream: Pieces, args: list[str], tmp_path: Path, folder: Path) -> None:
    (tmp_path / "IMAGE").write_bytes(stream.encode())
    for name, path in {
        "IMAGE": tmp_path / "IMAGE",
        "FILE": folder / "vm.mig",
        "OUT": tmp_path / "out",
    }.items():
        args = [arg.replace(name, str(path)) for arg in args]
    done = run(*args, "--json")
    assert done.returncode == 1, done
    assert_one_line(done.stderr)
    assert list(folder.iterdir()) == []
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["status"] == "failed"
    assert said["error"] in done.stderr


@pytest.mark.parametrize("number", ["987", "99999999999999999999"])
@pytest.mark.parametrize("command", ["receive", "send"])
def test_descriptor_that_is_none(
    stream: Pieces, command: str, number: str, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "IMAGE").write_bytes(stream.encode())
    uri = f"fd:{number}"
    args = [uri, str(folder / "vm.mig")] if command == "receive" else [str(tmp_path / "IMAGE"), uri]
    done = run(command, *args)
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["[/x]", "[red]rom", "[link=http://x]y", "a:smile:"])
def test_info_of_names_that_look_like_markup(name: str, tmp_path: Path) -> None:
    """A name from the stream is printed as it is."""
    path = tmp_path / "vm.mig"
    with Guest({name: b"\1"}, {name: b"\1"}) as guest:
        guest.guest.configuration = mig_configuration(name)
        streams.stream_of(guest, path)
    done = run("info", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(name) == 3


def mig_configuration(machine: str) -> Configuration:
    return Configuration(machine, page_bits=10)


# ---- signals ------------------------------------------------------------------------------------


@contextmanager
def receiving(folder: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``mig receive`` that listens and handles signals; its process and socket path."""
    uri = f"unix:{folder.parent / 'socket'}"
    process = subprocess.Popen(
        mig_command("receive", uri, str(folder / "vm.mig"), *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        match = LISTENING.fullmatch(line)
        assert match, line + process.stderr.read()
        yield process, match[1]
    finally:
        process.kill()
        process.communicate()


def wait_for_handlers(process: subprocess.Popen[str]) -> None:
    """Until SIGTERM is caught: the listening line may come a moment before."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.005)
    raise AssertionError("SIGTERM is never caught")


@contextmanager
def midway(path: str, data: bytes) -> Iterator[socket.socket]:
    """A source that has sent ``data`` and been heard (its PING is answered)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(path)
        sock.sendall(data)
        assert sock.recv(8, socket.MSG_WAITALL) == b"\0\2\0\4" + be32(1)
        yield sock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_signal_while_listening(folder: Path, number: signal.Signals, as_json: bool) -> None:
    with receiving(folder, *["--json"] * as_json) as (process, path):
        wait_for_handlers(process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert_one_line(stderr)
        if as_json:
            assert json.loads(stdout.splitlines()[-1])["kind"] == "CancelledError"
        assert list(folder.iterdir()) == []
        assert not Path(path).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_midway(stream: Pieces, folder: Path, number: signal.Signals) -> None:
    data = streams.with_return_path(stream).encode()[:2500]
    with receiving(folder) as (process, path), midway(path, data) as sock:
        wait_for_handlers(process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert_one_line(stderr)
        assert sock.recv(100) == b"\0\1\0\4" + be32(1)
        assert list(folder.iterdir()) == []


def test_many_signals(stream: Pieces, folder: Path) -> None:
    """Impatient fingers: the second signal must not find the first one's lock."""
    data = streams.with_return_path(stream).encode()[:2500]
    with receiving(folder) as (process, path), midway(path, data):
        wait_for_handlers(process)
        for _ in range(200):
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        # one that comes after the end of the migration finds the default handler
        assert process.returncode in (1, -signal.SIGTERM, -signal.SIGINT, 130)
    assert list(folder.iterdir()) == []


def test_kill_leaves_nothing(stream: Pieces, folder: Path) -> None:
    """No FILE; where the file system has files without names, nothing at all."""
    data = streams.with_return_path(stream).encode()[:2500]
    with receiving(folder) as (process, path), midway(path, data):
        process.kill()
        process.wait(60)
        assert not (folder / "vm.mig").exists()
        assert [p.name for p in folder.iterdir() if not p.name.endswith(".partial")] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_sending(stream: Pieces, tmp_path: Path, number: signal.Signals) -> None:
    image = tmp_path / "vm.mig"
    image.write_bytes(stream.encode())
    with streams.pair() as (mine, theirs):
        process = subprocess.Popen(
            mig_command("send", str(image), f"fd:{theirs.fileno()}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        mine.settimeout(60)
        assert mine.recv(1)
        wait_for_handlers(process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert_one_line(stderr)


def test_send_to_a_destination_that_refuses(stream: Pieces, tmp_path: Path) -> None:
    image = tmp_path / "vm.mig"
    image.write_bytes(stream.encode())
    with streams.pair() as (mine, theirs):
        mine.sendall(b"\0\1\0\4" + be32(1))
        done = subprocess.run(
            mig_command("send", str(image), f"fd:{theirs.fileno()}", "--json"),
            capture_output=True,
            text=True,
            pass_fds=[theirs.fileno()],
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert_one_line(done.stderr)
    assert json.loads(done.stdout.splitlines()[-1])["kind"] == "PeerError"
