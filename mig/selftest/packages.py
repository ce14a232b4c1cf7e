# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian packages fetched and unpacked without root and without touching the system's apt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mig.selftest.errors import SelftestError

_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BACKPORT_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_COMMAND_TIMEOUT = 900


def default_cache() -> Path:
    """Return the directory that fetched kernels and QEMUs are kept in."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "mig"


def qemu_backport_root(cache_dir: Path | None = None) -> Path:
    """Return where `fetch_qemu_backport` keeps its QEMU, whether or not it is there."""
    return (cache_dir or default_cache()) / "qemu-backport"


def fetch_qemu_backport(cache_dir: Path | None = None) -> Path:
    """Fetch the QEMU of Debian's backports, once; return the unpacked root directory."""
    root = qemu_backport_root(cache_dir)
    with locked(root.parent, "qemu-backport"):
        if not root.is_dir():
            _unpack_backport(root)
    _check_runs(root / "usr/bin/qemu-system-x86_64")
    return root


def _unpack_backport(root: Path) -> None:
    codename = debian_codename()
    backports = f"{codename}-backports"
    with workspace(root.parent) as directory:
        apt = PrivateApt(directory, (codename, backports), target=backports)
        unpacked = directory / "root"
        for package in apt.download(_BACKPORT_PACKAGES):
            run(["dpkg", "-x", str(package), str(unpacked)], "unpacking a package")
        # A rename, so that nobody ever sees half of it.
        unpacked.rename(root)


def _check_runs(program: Path) -> None:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SelftestError(f"{program} does not run: {error}") from error
    if done.returncode == 0:
        return
    missing = ", ".join(_missing_libraries(program))
    if missing:
        raise SelftestError(
            f"{program} needs libraries that are not installed: {missing} "
            "(apt-get install qemu-system-x86 brings most of them)"
        )
    raise SelftestError(f"{program} does not run: {done.stderr.strip()}")


def _missing_libraries(program: Path) -> list[str]:
    if shutil.which("ldd") is None:
        return []
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return re.findall(r"^\s*(\S+) => not found", listing.stdout, re.MULTILINE)


def debian_codename() -> str:
    """Return the code name of the Debian release this runs on."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            name, _, value = line.partition("=")
            fields[name] = value.strip("\"'")
    codename = fields.get("VERSION_CODENAME", "")
    if fields.get("ID") != "debian" or not codename:
        raise SelftestError("packages are only fetched on Debian: this is another system")
    return codename


def debian_mirror(codename: str, etc_apt: Path = Path("/etc/apt")) -> str:
    """Return the mirror that the system's own sources use, or Debian's default."""
    for path in [etc_apt / "sources.list", *sorted(etc_apt.glob("sources.list.d/*"))]:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError):
            continue
        found = _deb822_sources(text) if path.suffix == ".sources" else _line_sources(text)
        for uri, suites, components in found:
            if codename in suites and "main" in components and uri.startswith("http"):
                return uri
    return _DEFAULT_MIRROR


_Source = tuple[str, list[str], list[str]]


def _line_sources(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line.strip())
        if match:
            yield match[1], [match[2]], match[3].split()


def _deb822_sources(text: str) -> Iterator[_Source]:
    plain = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", plain):
        fields = {
            name.lower(): value.split()
            for name, value in re.findall(r"^(\S+?):((?:.*)(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        }
        if "deb" not in fields.get("types", []) or fields.get("enabled") == ["no"]:
            continue
        for uri in fields.get("uris", []):
            yield uri, fields.get("suites", []), fields.get("components", [])


class PrivateApt:
    """apt with all its state in one directory of ours, which must be empty."""

    def __init__(self, directory: Path, suites: Sequence[str], target: str | None = None) -> None:
        for tool in ("apt-get", "apt-cache", "apt-config", "dpkg"):
            if shutil.which(tool) is None:
                raise SelftestError(f"packages cannot be fetched: there is no {tool} here")
        if not _KEYRING.exists():
            raise SelftestError(
                f"packages cannot be fetched: {_KEYRING} is missing "
                "(apt-get install debian-archive-keyring)"
            )
        self._directory = directory
        self._target = [] if target is None else ["-t", target]
        self._environment = {**os.environ, "LC_ALL": "C", "APT_CONFIG": str(directory / "apt.conf")}
        self._write_configuration(suites)
        self._run(["apt-get", "-q", "update"], "fetching the package lists")

    def dependencies(self, package: str) -> list[str]:
        """Return the names of the packages that `package` depends on."""
        text = self._run(["apt-cache", "depends", package], f"looking up {package}")
        return re.findall(r"^\s*\|?Depends: ([^<\s]\S*)", text, re.MULTILINE)

    def download(self, packages: Sequence[str]) -> list[Path]:
        """Download packages, without what they depend on; return the files."""
        into = Path(tempfile.mkdtemp(dir=self._directory))
        self._run(
            ["apt-get", "-q", *self._target, "download", *packages],
            f"downloading {' '.join(packages)}",
            into,
        )
        return sorted(into.glob("*.deb"))

    def _write_configuration(self, suites: Sequence[str]) -> None:
        here = self._directory
        for name in ("state/lists/partial", "cache/archives/partial", "empty", "log"):
            (here / name).mkdir(parents=True)
        (here / "status").touch()
        mirror = debian_mirror(suites[0])
        (here / "sources.list").write_text(
            "".join(f"deb [arch=amd64 signed-by={_KEYRING}] {mirror} {s} main\n" for s in suites)
        )
        settings = {
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "Dir::State": here / "state",
            "Dir::State::lists": here / "state/lists",
            "Dir::State::status": here / "status",
            "Dir::Cache": here / "cache",
            "Dir::Cache::archives": here / "cache/archives",
            "Dir::Log": here / "log",
            "Dir::Etc::sourcelist": here / "sources.list",
            "Dir::Etc::sourceparts": here / "empty",
            # The system's configuration may hold hooks that act on the system.
            "Dir::Etc::main": here / "empty/apt.conf",
            "Dir::Etc::parts": here / "empty",
            "Dir::Etc::preferences": here / "empty/preferences",
            "Dir::Etc::preferencesparts": here / "empty",
        }
        if os.geteuid() == 0:
            # apt's unprivileged user cannot read a private cache.
            settings["APT::Sandbox::User"] = "root"
        own = "".join(f'{name} "{value}";\n' for name, value in settings.items())
        (here / "apt.conf").write_text(_network_settings() + own)

    def _run(self, command: list[str], what: str, cwd: Path | None = None) -> str:
        return run(command, what, cwd or self._directory, self._environment)


def _network_settings() -> str:
    """Proxies and the like: without them the system's mirror may be out of reach."""
    dump = run(["apt-config", "dump"], "reading apt's settings")
    wanted = re.compile(r"Acquire::https?\b.*;$", re.IGNORECASE)
    return "".join(line + "\n" for line in dump.splitlines() if wanted.match(line))


def extract_one(package: Path, pattern: str, to: Path) -> str:
    """Write the one file of a package that matches `pattern` to `to`; return its name."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
            for member in archive:
                data = archive.extractfile(member) if member.isfile() else None
                if data is not None and re.search(pattern, member.name):
                    with to.open("wb") as output:
                        shutil.copyfileobj(data, output)
                    unpacker.kill()
                    return Path(member.name).name
    raise SelftestError(f"{package.name} holds no file like {pattern}")


def run(
    command: list[str], what: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run a program; return its output, or raise a `SelftestError` with its complaint."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SelftestError(f"{what} failed: {error}") from error
    if done.returncode != 0:
        raise SelftestError(f"{what} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextlib.contextmanager
def locked(directory: Path, name: str) -> Iterator[None]:
    """Hold a lock between processes: the second to come finds the work done."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """Give a temporary directory on the same file system as `directory`."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as name:
        yield Path(name)
