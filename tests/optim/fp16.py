"""A trainer on the CPU in fp16."""

from pathlib import Path

from flare.data.token_cache.cache import TokenCache
from flare.plan.trainable import Trainable
from flare.train.trainer import Trainer
from tests.train.test_training import load, trainer

STAGES = {1: Trainable(False, (1, 3)), 2: Trainable(True)}


def fp16(base: Path, cache: TokenCache, tmp_path: Path, stage: int = 2, **changes: object) -> Trainer:
    return trainer(load(base, [1, 3], STAGES[stage], precision="fp16"), cache, tmp_path, **changes)
