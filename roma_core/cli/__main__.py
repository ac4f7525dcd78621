"""``python -m roma_core.cli``: what launchers start."""

from roma_core.cli import main

main(prog_name="roma")
