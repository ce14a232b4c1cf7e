"""The process that the guest of `mig demo` moves to; job.py starts it and talks to it.

It prints a line of JSON when it listens, one when the guest runs here, and, for each line that it
reads, one with what the guest says of itself. It ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

from mig.demo.guests import Options, make_show
from mig.engine import IncomingMigration
from mig.errors import MigError
from mig.options import Capability


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main(uri: str, options: Options, how: Mapping[str, Any]) -> None:
    """Receive the guest at ``uri`` and let it run; how: arguments of IncomingMigration."""
    with closing(make_show(options)) as show:
        if Capability.POSTCOPY_RAM not in how.get("capabilities", ()):
            # a destination that waits to be migrated to can have its memory ready
            with suppress(OSError):
                for block in show.guest.memory:
                    block.populate()
        incoming = IncomingMigration(show.guest, **how)
        incoming.listen(uri)
        _say(uri=incoming.uri)
        try:
            incoming.wait()
        except MigError as error:
            _say(error=str(error))
            return
        if not show.guest.running:
            show.guest.resume()
        times = show.guest.postcopy_times()
        _say(
            status=str(incoming.status),
            resumed_at=show.resumed_at,
            requests=times.requests,
            faults=times.faults,
            latencies=[times.percentile(share) for share in (0.5, 0.99)],
            blocktimes=[times.all_vcpus, *times.vcpus],
        )
        for _ in sys.stdin:
            _say(**show.verify())


if __name__ == "__main__":
    main(sys.argv[1], Options.from_json(sys.argv[2]), json.loads(sys.argv[3]))
