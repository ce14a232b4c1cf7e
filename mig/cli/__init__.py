"""The command line: ``mig COMMAND …``."""

from __future__ import annotations

from importlib import import_module

import click

import mig

_COMMANDS = (
    "demo",
    "receive",
    "send",
    "info",
    "analyze",
    "diff",
    "check",
    "convert",
    "selftest",
)


class _Commands(click.Group):
    """Loads only the command that is called: a migration begins as soon as can be."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"mig.cli.{cmd_name}"), cmd_name)
        return command


def _say_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"mig, version {mig.__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Show the version and exit.",
)
def main() -> None:
    """QEMU's live migration from the command line.

    URI is one of QEMU's: tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH[,offset=N].

    Exit status: 0 done, 1 failed (one line on standard error says why), 2 wrong usage.
    """
