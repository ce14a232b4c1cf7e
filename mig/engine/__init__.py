"""The engine: migrations as objects. The only place that owns threads."""

from mig.engine.blockers import Blockers, Moment
from mig.engine.convergence import Convergence, ConvergencePolicy, Patient, Period, PolicyMaker
from mig.engine.goover import AfterPasses, PostcopyPolicy, WhenStuck
from mig.engine.incoming import IncomingMigration
from mig.engine.outgoing import OutgoingMigration
from mig.engine.recovery import Attempt, RecoveryPolicy, Retry
from mig.engine.restore import restore

__all__ = [
    "AfterPasses",
    "Attempt",
    "Blockers",
    "Convergence",
    "ConvergencePolicy",
    "IncomingMigration",
    "Moment",
    "OutgoingMigration",
    "Patient",
    "Period",
    "PolicyMaker",
    "PostcopyPolicy",
    "RecoveryPolicy",
    "Retry",
    "WhenStuck",
    "restore",
]
