"""Captured VMs in other formats: stream, mapped-ram, raw memory, ELF core."""

from mig.conversion.convert import Format, convert, save_image

__all__ = ["Format", "convert", "save_image"]
