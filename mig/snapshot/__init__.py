"""Background snapshots: memory as it was at one moment, while the guest writes on."""
