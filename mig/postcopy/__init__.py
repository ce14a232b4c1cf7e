"""Postcopy: the guest runs at the destination while some of its memory is still at the source."""
