"""Slow, obvious oracles: what mig must do, written so that one can see it is right.

Nothing here imports mig, and every wire number is spelled out again.
"""
