"""Move a running guest: its threads write memory here until the switchover, and then there."""

import tempfile

import mig

with tempfile.TemporaryDirectory() as folder, mig.ProcessGuest(64 << 20) as here:
    there = mig.ProcessGuest(64 << 20)
    incoming = mig.IncomingMigration(there)
    incoming.listen(f"unix:{folder}/socket")
    here.start()
    outgoing = mig.OutgoingMigration(here, capabilities={"return-path", "auto-converge"})
    outgoing.start(incoming.uri)
    outgoing.wait()
    there.resume()
    info, report = outgoing.query(), there.verify()
    there.close()

print(f"{info.ram.dirty_sync_count} iterations, {info.downtime * 1000:.1f} ms of downtime")
print("nothing is corrupt" if report.ok else "corrupt")
