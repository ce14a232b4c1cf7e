"""The savevm side of a stream: sections, device state and its description."""
