# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMUs running a guest that checks its own memory, to verify migrations end to end."""
