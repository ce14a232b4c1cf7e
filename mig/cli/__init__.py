"""The command line: ``mig COMMAND …``."""

from __future__ import annotations

import click

import mig
from mig.cli.analyze import analyze
from mig.cli.check import check
from mig.cli.convert import convert
from mig.cli.demo import demo
from mig.cli.diff import diff
from mig.cli.info import info
from mig.cli.receive import receive
from mig.cli.selftest import selftest
from mig.cli.send import send


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mig.__version__, prog_name="mig")
def main() -> None:
    """QEMU's live migration from the command line.

    URI is one of QEMU's: tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH[,offset=N].

    Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage.
    """


for _command in (demo, receive, send, info, analyze, diff, check, convert, selftest):
    main.add_command(_command)
