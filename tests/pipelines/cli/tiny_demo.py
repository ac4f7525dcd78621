"""``roma-pipeline demo`` with the tiny experiment in place of those that ship.

python -m tests.pipelines.cli.tiny_demo FOLDER [--min-free-mb MB] [ARGUMENT…]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import roma_pipelines.definitions
import roma_pipelines.storage
from roma_pipelines.cli import main
from tests.pipelines import tiny

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--min-free-mb", type=int, default=roma_pipelines.storage.MIN_FREE_MB)
options, arguments = parser.parse_known_args()

sections = tiny.attributes(options.folder)
for training, epochs in (("pretraining", 100), ("finetuning", 120)):  # they are met while they run
    sections[training]["trainer"]["epochs"] = epochs
roma_pipelines.definitions.defs = lambda: tiny.definitions(sections)
roma_pipelines.storage.MIN_FREE_MB = options.min_free_mb
main(["demo", *arguments], prog_name="roma-pipeline")
