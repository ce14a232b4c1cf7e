"""Byte streams, in and out, without I/O of their own."""
