#!/usr/bin/env python3
"""Evaluate a causal language model: perplexity, long contexts, retrieval. Writes JSON and a report with plots.

--compare_to evaluates further models on the same documents.
"""

import os
import sys
from pathlib import Path

from flare.cpu import wait_without_spinning
from flare.errors import run_script
from flare.evaluation.options import resolve_settings
from flare.logs import quiet_torchao

SCRIPT = Path(__file__).resolve()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    wait_without_spinning()
    settings = resolve_settings(argv)
    quiet_torchao()
    from flare.evaluation import launch

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return launch.join(settings)
    return launch.start(SCRIPT, settings, argv)


if __name__ == "__main__":
    sys.exit(run_script(main))
