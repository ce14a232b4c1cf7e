# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the self-test raises."""


class SelftestError(Exception):
    """The self-test cannot go on; the message says why and what to do about it."""
