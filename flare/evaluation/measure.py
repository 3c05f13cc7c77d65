"""Measures one model, part by part. Parts that an interrupted evaluation has finished are not measured again.

All ranks call the same methods in the same order. Results are JSON, as in evaluation_results.json.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import ConfigError, FlareError
from flare.evaluation.datasets import DatasetRequest
from flare.evaluation.finished import FinishedParts, model_identity, texts_identity
from flare.evaluation.lm_eval_tasks import run_lm_eval
from flare.evaluation.models import Milestone, loaded, probe
from flare.evaluation.options import EvaluationSettings
from flare.evaluation.results import (
    add_dataset,
    add_failure,
    add_throughput,
    model_record,
    new_results,
    printed_settings,
)
from flare.evaluation.scoring.batches import Engine, Progress
from flare.evaluation.scoring.context import beyond_positions, score_context_lengths
from flare.evaluation.scoring.generation import generation_samples
from flare.evaluation.scoring.lambada import score_lambada
from flare.evaluation.scoring.passkey import DEPTHS, make_samples, score_passkey
from flare.evaluation.scoring.perplexity import DatasetScore, score_documents
from flare.evaluation.scoring.scorer import TokenScorer
from flare.logs import log
from flare.terminal import columns

NUMBERS = (
    "protocol", "max_length", "stride", "min_tokens", "prefix_token_id", "precision", "attn_implementation", "seed",
)  # fmt: skip
"""Settings that every number depends on."""


class PartFailed(FlareError):
    """One part cannot be measured; the evaluation continues with the others."""


@dataclass
class Task:
    """Documents of each data set, and failures so far (data set -> error)."""

    requests: dict[str, DatasetRequest]
    texts: dict[str, list[str]]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where an evaluation runs: ranks, device of this rank (None: all GPUs), and finished parts on disk."""

    world: World
    device: torch.device | None
    parts: FinishedParts


class Measurement:
    """Measures one model.

    Args:
        save: called with the results after each part.
    """

    def __init__(
        self, settings: EvaluationSettings, task: Task, place: Place, who: Milestone, save: Callable[[dict], None]
    ) -> None:
        self.settings, self.task, self.place, self.who, self.save = settings, task, place, who, save
        numbers = {name: getattr(settings, name) for name in NUMBERS}
        where = place.device.type if place.device else "auto"
        self.identity = {"model": model_identity(who.directory), "device": where, **numbers}
        self.texts_identity = {name: texts_identity(texts) for name, texts in task.texts.items()}
        self.scores: dict[str, DatasetScore] = {}

    def run(self, environment: dict, with_extras: bool) -> dict:
        """The results of this model.

        Args:
            with_extras: also run lm-eval tasks and generate samples, which are not compared.
        """
        with loaded(self.who.directory, self.settings, self.place.device) as (model, tokenizer, device):
            self.model, self.tokenizer, self.device = model, tokenizer, device
            record = model_record(model, tokenizer, str(self.who.directory), probe(model))
            printed = printed_settings(self.settings, tokenizer, self.place.world.size)
            self.results = new_results(record, printed, environment)
            self._warn_about_lengths()
            self._datasets()
            self._context_lengths()
            self._passkey()
            if with_extras:
                self._extras()
            self._throughput()
            for name, error in self.task.failed.items():
                if name not in self.results["datasets"]:
                    add_failure(self.results, name, error)
            del self.model, self.tokenizer
        return self.results

    # -- parts -------------------------------------------------------------------------------------

    def _datasets(self) -> None:
        for name, texts in self.task.texts.items():
            if name in self.task.failed:
                continue
            try:
                part = self._part("dataset", name, {}, lambda n=name, t=texts: self._score(n, t))
            except PartFailed as error:
                self._fail(name, error)
                continue
            score = DatasetScore.from_dict(part["score"])
            self.scores[name] = score
            add_dataset(self.results, name, score, part["last_words"])
            log.info(f"{self.who.label} on {name}: perplexity {score.perplexity or float('inf'):.4g}")
            self.save(self.results)

    def _score(self, name: str, texts: list[str]) -> dict:
        settings = self.settings
        with self._bar(name) as progress:
            score = score_documents(
                self.model,
                self.tokenizer,
                texts,
                max_length=settings.max_length,
                batch_size=settings.batch_size,
                device=self.device,
                stride=settings.stride,
                protocol=settings.protocol,
                prefix_token_id=settings.prefix_token_id,
                min_tokens=settings.min_tokens,
                world=self.place.world,
                progress=progress,
            )
        last_words = {}
        if self.task.requests[name].is_lambada:
            with self._bar(f"{name}, last words") as progress:
                engine = self._engine(texts[0])
                last_words = score_lambada(engine, self.tokenizer, texts, settings.max_length, progress)
        return {"score": score.to_dict(), "last_words": last_words}

    def _context_lengths(self) -> None:
        lengths = list(self.settings.context_lengths)
        if not lengths:
            return
        curves, reasons = {}, []
        for name in self.scores:
            try:
                curves[name] = self._part(
                    "context", name, {"lengths": lengths}, lambda n=name: self._curve(n, lengths)
                )
            except PartFailed as error:
                reasons.append(f"{name}: {error}")
        self.results["context_lengths"] = {name: part["rows"] for name, part in curves.items()}
        if not curves:
            self._fail("--context_lengths", "; ".join(reasons) or "no data set could be scored")
        for reason in reasons if curves else ():
            log.warning(f"context lengths: {reason}")
        self.save(self.results)

    def _curve(self, name: str, lengths: list[int]) -> dict:
        texts = self.task.texts[name]
        prefix = self.settings.prefix_token_id
        with self._bar(f"{name}, context lengths") as progress:
            engine = self._engine(texts[0])
            return {"rows": score_context_lengths(engine, self.tokenizer, texts, lengths, progress, prefix)}

    def _passkey(self) -> None:
        settings = self.settings
        if not settings.passkey:
            return

        def work() -> dict:
            with self._bar("passkey") as progress:
                return {
                    "rows": score_passkey(self._engine(samples[0].prompt), self.tokenizer, samples, True, progress)
                }

        lengths = list(settings.passkey_lengths)
        try:
            samples = make_samples(self.tokenizer, lengths, DEPTHS, settings.passkey_samples, settings.seed)
            identity = {"prompts": texts_identity([sample.prompt for sample in samples])}
            self.results["passkey"] = self._part("passkey", "", identity, work)["rows"]
        except (ConfigError, PartFailed) as error:
            self._fail("--passkey", error)
        self.save(self.results)

    def _extras(self) -> None:
        settings, world = self.settings, self.place.world
        if settings.lm_eval_tasks:
            identity = {"tasks": settings.lm_eval_tasks, "limit": settings.lm_eval_limit}
            work = lambda: run_lm_eval(self.model, self.tokenizer, settings, world)  # noqa: E731
            try:
                self.results["lm_eval"] = self._part("lm_eval", "", identity, work)
            except PartFailed as error:
                self._fail("--lm_eval_tasks", error)
            self.save(self.results)
        if settings.generate_tokens:
            identity = {"tokens": settings.generate_tokens}
            work = lambda: process_group.run_on_main_rank(world, self._samples)  # noqa: E731
            self.results["samples"] = self._part("samples", "", identity, work)["rows"]

    def _samples(self) -> dict:
        settings = self.settings
        return {"rows": generation_samples(self.model, self.tokenizer, settings.generate_tokens, settings.seed)}

    # -- helpers ---------------------------------------------------------------------------------------

    def _part(self, kind: str, name: str, more: dict, work: Callable[[], dict]) -> dict:
        """Numbers of a part: read from disk if an earlier evaluation finished it, otherwise measured and written.

        Raises: PartFailed if it cannot be measured; EnvError if it cannot be written.
        """
        identity = self.identity | more | {"kind": kind, "texts": self.texts_identity.get(name)}
        title = f"{kind} {name}".strip()
        place = self.place
        part = process_group.run_on_main_rank(place.world, lambda: place.parts.read(title, identity))
        if part is not None:
            log.info(f"{self.who.label}, {title}: finished before, read from {place.parts.directory}")
            return part
        try:
            part = work()
        except FlareError as error:
            raise PartFailed(str(error)) from error
        process_group.run_on_main_rank(place.world, lambda: place.parts.write(title, identity, part))
        return part

    def _fail(self, name: str, error: FlareError | str) -> None:
        log.warning(f"{name}: {error}")
        self.task.failed[name] = str(error)

    def _engine(self, text: str) -> Engine:
        """An engine for the loaded model. ``text`` is a sample with which it tests the model."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        scorer = TokenScorer(self.model, self.device, ids)
        return Engine(scorer, self.settings.batch_size * self.settings.max_length, self.place.world)

    @contextmanager
    def _bar(self, title: str) -> Iterator[Progress | None]:
        """A progress bar on the terminal of rank 0."""
        if not self.place.world.is_main:
            yield None
            return
        width = columns(sys.stderr)
        with tqdm(unit=" tokens", unit_scale=True, desc=title, disable=None, leave=False, ncols=width) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield progress

    def _warn_about_lengths(self) -> None:
        lengths = {*self.settings.context_lengths, self.settings.max_length}
        if self.settings.passkey:
            lengths |= set(self.settings.passkey_lengths)
        warning = beyond_positions(self.model, sorted(lengths))
        if warning:
            log.warning(f"{self.who.label}: {warning}")

    def _throughput(self) -> None:
        add_throughput(self.results, list(self.scores.values()), self.device)
        peak = self.results["throughput"]["peak_memory_bytes"]
        self.results["throughput"]["peak_memory_bytes"] = int(process_group.all_reduce_max([float(peak)])[0])
