"""lm-eval on several ranks: rank 0 loads tasks and documents, and all ranks answer its requests.

lm-eval itself distributes documents over ranks. It then needs at least as many documents as ranks, repeats some as
padding, and loads every task on every rank. Distributing only the requests avoids this.
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
        """Rank 0: the other ranks answer requests until this block ends, also after an exception."""
        try:
            yield
        finally:
            process_group.scatter_objects([None] * self.world.size)

    def serve(self) -> None:
        """Other ranks: answer requests of rank 0 until it sends None."""
        while (work := process_group.scatter_objects(None)) is not None:
            with suppress(FlareError):  # rank 0 raises the same error and ends this loop
                self._answer_together(*work)

    def _share(self, kind: str, requests: list[Instance]) -> list:
        """Rank 0: answers in the order of the requests."""
        indices = distribute([request.args for request in requests], self.world.size)
        work = [(kind, [requests[i].args for i in part]) for part in indices]
        answers = self._answer_together(*process_group.scatter_objects(work))
        found = {
            i: answer
            for part, given in zip(indices, answers, strict=True)
            for i, answer in zip(part, given, strict=True)
        }
        return [found[i] for i in range(len(requests))]

    def _answer_together(self, kind: str, arguments: list[tuple]) -> list[list]:
        """Answers of all ranks, by rank. A collective: an error is raised on all ranks."""
        return process_group.run_on_all_ranks(self.world, lambda: self._answer(kind, arguments))

    def _answer(self, kind: str, arguments: list[tuple]) -> list:
        requests = [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]
        method = getattr(super(), kind)
        return method(requests, disable_tqdm=not self.world.is_main) if requests else []


def distribute(arguments: Sequence[tuple], num_ranks: int) -> list[list[int]]:
    """Indices of the requests of each rank, in turn. Adjacent requests with the same context stay together.

    lm-eval computes the context of a multiple-choice question once if one process has all its answers.
    """
    groups = [[i for i, _ in group] for _, group in groupby(enumerate(arguments), key=lambda pair: pair[1][0])]
    return [[i for group in groups[rank::num_ranks] for i in group] for rank in range(num_ranks)]
