"""Generated text: greedy and seeded samples for fixed prompts, and their repetition rate."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from flare.evaluation.scoring.scorer import evaluating
from flare.nope.probe import input_device

PROMPTS = (
    "The most important thing about a good tool is",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "In the year 1905, a clerk at the patent office in Bern",
    "The list of primes below thirty is: 2, 3, 5,",
)
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
NGRAM = 4


def generation_samples(model: nn.Module, tokenizer, new_tokens: int, seed: int = 0) -> list[dict]:
    """Continue each prompt twice: greedy, and sampled with a fixed seed.

    Returns: ``{"prompt", "greedy", "greedy_repetition", "sampled", "sampled_repetition"}`` per prompt; the
    repetition rate is that of the new tokens.
    """
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
        row = {"prompt": prompt}
        for name, settings in (("greedy", GREEDY), ("sampled", SAMPLED)):
            torch.manual_seed(seed)
            (new_ids,) = generate(model, tokenizer, [ids], settings | {"max_new_tokens": new_tokens})
            row[name] = tokenizer.decode(new_ids, skip_special_tokens=True)
            row[f"{name}_repetition"] = repetition_rate(new_ids)
        rows.append(row)
    return rows


def repetition_rate(ids: list[int], n: int = NGRAM) -> float:
    """Share of token n-grams that occurred earlier in the text: 0 for no repetition, near 1 for a loop.

    Source: Welleck et al. 2019 (arXiv 1908.04319), seq-rep-4.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def greedy_texts(
    model: nn.Module, tokenizer, prompts: list[list[int]], settings: dict, stop_texts: list[str] | None = None
) -> list[str]:
    """Greedy continuations of the prompts. A text ends early when it contains its entry of ``stop_texts``."""
    stop = _Contains(tokenizer, max(map(len, prompts)), stop_texts) if stop_texts else None
    return [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(model, tokenizer, prompts, settings, stop)
    ]


def generate(
    model: nn.Module, tokenizer, prompts: list[list[int]], settings: dict, stop: StoppingCriteria | None = None
) -> list[list[int]]:
    """New tokens of each prompt, up to the end-of-text token. Prompts are padded on the left.

    The model's own generation_config (such as the repetition penalty of an instruct model) is ignored.
    """
    end = tokenizer.eos_token_id
    longest = max(map(len, prompts))
    device = input_device(model)
    pad = end if end is not None else 0
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    with evaluating(model), _default_generation_config(model):
        output = model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=GenerationConfig(**settings, eos_token_id=end, pad_token_id=pad),
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        )
    new = output[:, longest:].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in new]


class _Contains(StoppingCriteria):
    """A row is finished when its text contains its stop text."""

    def __init__(self, tokenizer, prompt_length: int, stop_texts: list[str]) -> None:
        self.tokenizer, self.prompt_length, self.stop_texts = tokenizer, prompt_length, stop_texts

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        done = [wanted in text for wanted, text in zip(self.stop_texts, texts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@contextlib.contextmanager
def _default_generation_config(model: nn.Module) -> Iterator[None]:
    """Remove the generation_config of the model, from which ``generate`` would fill unset values."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
