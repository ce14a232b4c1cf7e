"""``python -m mig`` is ``mig``."""

from mig.cli import main

main(prog_name="mig")
