"""Progress on a terminal, for commands that migrate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from mig.engine.migration import Migration

#: waits for migrations and calls back for each every so many seconds
Wait = Callable[[Sequence[Migration], float, Callable[[Migration], None]], None]


def show_progress(migrations: Sequence[Migration], wait: Wait) -> None:
    """Show how far each is while ``wait`` waits."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = [progress.add_task(migration.status, total=None) for migration in migrations]

        def show(migration: Migration) -> None:
            info = migration.query()
            ram = info.ram
            moved = (ram.normal + ram.duplicate) * ram.page_size
            # pages that are sent again come on top of the total
            progress.update(
                tasks[migrations.index(migration)],
                description=str(info.status),
                completed=moved,
                total=max(ram.total, moved + (ram.remaining or 0)) if ram.total else None,
            )

        wait(migrations, 0.1, show)
