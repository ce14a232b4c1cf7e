# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the self-test raises."""

from mig.errors import MigError


class SelftestError(MigError):
    """The self-test cannot go on; the message says why and what to do about it."""
