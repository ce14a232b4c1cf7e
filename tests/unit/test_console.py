"""What the guest says about touches that had to wait."""

from mig.selftest.console import parse_ticks, slow_touches

SAID = (
    "mig-guest: tick 7 checked 0 bad 0\r\n"
    "mig-guest: slow 25 1300 47\r\n"
    "mig-guest: tick 8 checked 0 bad 0\r\n"
    "mig-guest: slow 88\n"
    "mig-guest: slow 12"
)


def test_slow_touches_of_finished_lines_count():
    assert slow_touches(SAID) == [25, 1300, 47, 88]
    assert slow_touches("") == []
    assert [tick.number for tick in parse_ticks(SAID)] == [7, 8]
