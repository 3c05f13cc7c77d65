"""Run under torchrun: score passkeys on the ranks together; rank 0 writes the rows.

usage: passkey_ranks.py OUT.json
"""

import json
import sys
from pathlib import Path

from flare.distributed import process_group
from flare.evaluation.scoring.batches import Engine
from flare.evaluation.scoring.passkey import make_samples, score_passkey
from flare.evaluation.scoring.scorer import TokenScorer
from tests.evaluation.models import bytes_tokenizer
from tests.evaluation.test_passkey import Copier


def main(out: str) -> None:
    world = process_group.start(use_cuda=False, timeout_sec=60)
    tokenizer = bytes_tokenizer()
    engine = Engine(TokenScorer(Copier(tokenizer, True), "cpu", [1, 2, 3]), 4096, world)
    rows = score_passkey(engine, tokenizer, make_samples(tokenizer, [1200], (0, 100), 3), generate=True)
    if world.is_main:
        Path(out).write_text(json.dumps(rows))
    process_group.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
