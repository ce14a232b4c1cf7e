"""What a page log must hold: the last contents of every page."""

from __future__ import annotations

from reference.ram import Record


class PageLog:
    """Replays puts."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[tuple[bytes, int], bytes] = {}

    def put(self, record: Record) -> None:
        key = record.block, record.page
        self.pages[key] = record.expand(self.page_size, self.pages.get(key))
