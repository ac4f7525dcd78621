"""``python -m roma_pipelines.cli``: the same as ``roma-pipeline``."""

from roma_pipelines.cli import main

main(prog_name="roma-pipeline")
