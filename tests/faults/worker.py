"""train_qwen_multi_gpu.py with a fault in it: what a launcher starts after injections.in_workers."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_qwen_multi_gpu
from flare.errors import run_script
from tests.faults import injections

if __name__ == "__main__":
    name, *arguments = json.loads(os.environ["FLARE_TEST_FAULT"])
    getattr(injections, name)(*arguments)
    sys.exit(run_script(train_qwen_multi_gpu.main))
