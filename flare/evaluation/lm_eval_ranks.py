"""lm-eval on several ranks: rank 0 alone sees tasks and documents, all of them answer its requests.

lm-eval's own way, documents dealt out to ranks, needs as many documents as ranks, repeats some of them as padding, and
reads every task on every rank. A model's answers do not depend on who gives them, so that only requests are shared.
This module imports lm-eval, which is optional: it is imported where a task is run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import FlareError


class SharedHFLM(HFLM):
    """lm-eval's wrapper of transformers models, on every rank the same model.

    Rank 0 hands it to lm-eval inside ``others_serve``; meanwhile the others are in ``serve``.
    """

    def __init__(self, world: World, **settings) -> None:
        super().__init__(**settings)
        self.world = world

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._share("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._share("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._share("generate_until", requests)

    @contextmanager
    def others_serve(self) -> Iterator[None]:
        """Rank 0: the other ranks answer requests until the block is left, however that happens."""
        try:
            yield
        finally:
            process_group.scatter_objects([None] * self.world.size)

    def serve(self) -> None:
        """The other ranks: answer what rank 0 hands out, until it is done."""
        while (work := process_group.scatter_objects(None)) is not None:
            with suppress(FlareError):  # rank 0 raises the same, and ends this
                self._answer_together(*work)

    def _share(self, kind: str, requests: list[Instance]) -> list:
        """Rank 0: answers in the order of the requests."""
        hands = deal([request.args for request in requests], self.world.size)
        work = [(kind, [requests[i].args for i in hand]) for hand in hands]
        answers = self._answer_together(*process_group.scatter_objects(work))
        found = {
            i: answer
            for hand, given in zip(hands, answers, strict=True)
            for i, answer in zip(hand, given, strict=True)
        }
        return [found[i] for i in range(len(requests))]

    def _answer_together(self, kind: str, arguments: list[tuple]) -> list[list]:
        """Everyone's answers, by rank. A collective; all ranks raise, or none."""
        return process_group.run_on_all_ranks(self.world, lambda: self._answer(kind, arguments))

    def _answer(self, kind: str, arguments: list[tuple]) -> list:
        requests = [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]
        method = getattr(super(), kind)
        return method(requests, disable_tqdm=not self.world.is_main) if requests else []


def deal(arguments: Sequence[tuple], hands: int) -> list[list[int]]:
    """Indices of requests, dealt to so many hands in turn; neighbours with one context stay together.

    For the answers of a multiple choice lm-eval computes a context once, where the same process has them all.
    """
    groups = [[i for i, _ in group] for _, group in groupby(enumerate(arguments), key=lambda pair: pair[1][0])]
    return [[i for group in groups[hand::hands] for i in group] for hand in range(hands)]
