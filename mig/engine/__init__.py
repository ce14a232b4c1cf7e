"""The engine: migrations as objects. The only place that owns threads."""

from mig.engine.blockers import Blockers, Moment
from mig.engine.convergence import Convergence, ConvergencePolicy, Patient, Period, PolicyMaker
from mig.engine.incoming import IncomingMigration
from mig.engine.outgoing import OutgoingMigration
from mig.engine.restore import restore

__all__ = [
    "Blockers",
    "Convergence",
    "ConvergencePolicy",
    "IncomingMigration",
    "Moment",
    "OutgoingMigration",
    "Patient",
    "Period",
    "PolicyMaker",
    "restore",
]
