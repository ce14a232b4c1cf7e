"""The engine: migrations as objects. The only place that owns threads."""

from mig.engine.blockers import Blockers, Moment
from mig.engine.incoming import IncomingMigration
from mig.engine.outgoing import OutgoingMigration

__all__ = ["Blockers", "IncomingMigration", "Moment", "OutgoingMigration"]
