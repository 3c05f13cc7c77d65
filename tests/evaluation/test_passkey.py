"""Passkey and LAMBADA: RULER's own text and scorer, lm-eval's log-likelihoods, and models that copy or do not."""

import ast
import json
import math
import random
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flare.errors import ConfigError, DataError
from flare.evaluation.scoring import passkey
from flare.evaluation.scoring.batches import Engine
from flare.evaluation.scoring.continuation import encode_pair, score_continuations
from flare.evaluation.scoring.generation import generation_samples, repetition_rate
from flare.evaluation.scoring.lambada import last_word, score_lambada
from flare.evaluation.scoring.passkey import DEPTHS, make_samples, score_passkey, string_match_all, write_prompt
from flare.evaluation.scoring.scorer import TokenScorer
from tests.evaluation.models import PROSE, bpe_tokenizer, bytes_tokenizer, lookup_model, tiny, with_bos
from tests.processes import torchrun

RELATIVE = 1e-6


def engine(model, batch_tokens: int = 4096) -> Engine:
    return Engine(TokenScorer(model, "cpu", [1, 2, 3]), batch_tokens)


class Copier(torch.nn.Module):
    """Answers with the number in the text (or, when it does not copy, with ones); knows bytes as tokens."""

    def __init__(self, tokenizer, copies: bool) -> None:
        super().__init__()
        self.tokenizer, self.copies = tokenizer, copies
        self.embeddings = torch.nn.Embedding(len(tokenizer), 1)
        self.config = SimpleNamespace(model_type="copier", max_position_embeddings=10**6)
        self.generation_config = None

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return None

    def answer(self, ids: list[int]) -> tuple[int, list[int]]:
        """(index of the first token of the answer, its tokens)."""
        text = self.tokenizer.decode(ids)
        value = re.search(r"is: (\d+)\.", text)[1] if self.copies else "1" * 7
        start = text.rindex("mentioned in the provided text is") + len("mentioned in the provided text is")
        return start, self.tokenizer(f" {value}")["input_ids"]

    def forward(self, input_ids, use_cache=False):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in enumerate(input_ids.tolist()):
            start, answer = self.answer([i for i in ids if i != self.tokenizer.eos_token_id])
            for offset, token in enumerate(answer):
                if start - 1 + offset < len(ids):
                    logits[row, start - 1 + offset, token] = 20.0
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        end = self.tokenizer.eos_token_id
        new = [self.answer([i for i in ids if i != end])[1] + [end] for ids in input_ids.tolist()]
        return torch.cat([input_ids, torch.tensor(new)], 1)


# -- RULER --------------------------------------------------------------------------------------------


def ruler_source(name: str) -> ast.Module:
    spec = find_spec("lm_eval.tasks")
    if spec is None:
        pytest.skip("lm-eval is not installed")
    path = Path(spec.submodule_search_locations[0]) / "ruler" / name
    return ast.parse(path.read_text(encoding="utf-8"))


def constant(tree: ast.Module, name: str) -> str:
    return next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        and isinstance(node.value, ast.Constant) and (name != "haystack" or "grass" in node.value.value)
    )  # fmt: skip


def test_prompt_equals_rulers_niah_single_1():
    """RULER's generator as in lm-eval, extracted from its file (which needs word lists and the network)."""
    tree = ruler_source("prepare_niah.py")
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "generate_input_output")
    names = {
        "random": random,
        "RANDOM_SEED": 42,
        "generate_random": lambda kind: {"words": "odd-fox"}.get(kind, "7654321"),
    }
    exec(compile(ast.Module([function], []), "ruler", "exec"), names)
    template, noise = constant(ruler_source("niah_utils.py"), "TEMPLATE"), constant(tree, "haystack")
    for lines in (4, 10):
        random.seed(lines)
        theirs, answers, key = names["generate_input_output"](
            lines, noise, type_haystack="repeat", num_needle_k=1, type_needle_k="words", num_needle_v=1,
            type_needle_v="numbers", template=template,
        )  # fmt: skip
        depth = (
            100
            * theirs.split("\n")[1:-1].index(f"One of the special magic numbers for {key} is: {answers[0]}.")
            / lines
        )
        theirs += f" The special magic number for {key} mentioned in the provided text is"  # gen_prefix
        assert write_prompt(key, answers[0], depth, lines) == theirs


def test_string_match_equals_ruler():
    common = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    predictions = ["The number is 123.", "none", "AbC and def", ""]
    references = [["123"], ["9"], ["abc", "xyz"], ["1"]]
    assert string_match_all(predictions, references) == 100 * common.string_match_all(predictions, references)
    assert string_match_all(predictions, references) == pytest.approx(37.5)


def test_needle_is_at_its_depth_in_a_text_of_its_length():
    tokenizer = bytes_tokenizer()
    samples = make_samples(tokenizer, [1200, 2400], DEPTHS, 2)
    assert len(samples) == 2 * len(DEPTHS) * 2 and len({s.value for s in samples}) == len(samples)
    for sample in samples:
        length = len(tokenizer(f"{sample.prompt} {sample.value}")["input_ids"])
        assert sample.context_length - len(passkey.NOISE) - 1 <= length <= sample.context_length
        lines = sample.prompt.split("\n")[1:-1]
        (place,) = (i for i, line in enumerate(lines) if sample.value in line)
        assert place == round((len(lines) - 1) * sample.depth_percent / 100)
    assert samples == make_samples(tokenizer, [1200, 2400], DEPTHS, 2)
    assert samples[0].value != make_samples(tokenizer, [1200], DEPTHS, 1, seed=1)[0].value


def test_lengths_too_short_for_a_needle_are_skipped():
    tokenizer = bytes_tokenizer()
    assert {s.context_length for s in make_samples(tokenizer, [100, 1200], (50,), 1)} == {1200}
    with pytest.raises(ConfigError, match="a passkey needs"):
        make_samples(tokenizer, [100], (50,), 1)


@pytest.mark.parametrize(("copies", "found"), [(True, 100.0), (False, 0.0)])
def test_copying_model_finds_every_number(copies, found):
    tokenizer = bytes_tokenizer()
    samples = make_samples(tokenizer, [1200, 1500], (0, 50, 100), 3)
    rows = score_passkey(engine(Copier(tokenizer, copies)), tokenizer, samples, generate=True)
    assert [(row["context_length"], row["depth_percent"]) for row in rows] == [
        (n, depth) for n in (1200, 1500) for depth in (0, 50, 100)
    ]
    assert {(row["accuracy"], row["generated_accuracy"], row["num_samples"]) for row in rows} == {(found, found, 3)}
    assert all(row["value_loss"] < 1e-3 if copies else row["value_loss"] > 10 for row in rows)


def test_answers_of_several_ranks_are_in_the_order_of_the_samples(tmp_path):
    """Each text has a different number, so an answer that is assigned to another text would be wrong."""
    torchrun(2, "tests.evaluation.passkey_ranks", tmp_path / "rows.json")
    tokenizer = bytes_tokenizer()
    samples = make_samples(tokenizer, [1200], (0, 100), 3)
    assert len({sample.value for sample in samples}) == len(samples)
    alone = score_passkey(engine(Copier(tokenizer, True)), tokenizer, samples, generate=True)
    together = json.loads((tmp_path / "rows.json").read_text())
    assert [row.pop("value_loss") for row in together] == pytest.approx([row.pop("value_loss") for row in alone])
    assert together == alone and {row["generated_accuracy"] for row in together} == {100.0}


def test_generated_accuracy_is_none_without_generation():
    tokenizer = bytes_tokenizer()
    (row,) = score_passkey(
        engine(Copier(tokenizer, True)), tokenizer, make_samples(tokenizer, [1200], (50,), 1), False
    )
    assert row["generated_accuracy"] is None


def test_greedy_answers_equal_transformers_with_and_without_padding():
    tokenizer, model = bpe_tokenizer(), tiny(max_position_embeddings=2048)
    samples = make_samples(tokenizer, [500, 800], (50,), 2)
    together = passkey.generate_answers(engine(model, 4000), tokenizer, samples)
    alone = passkey.generate_answers(engine(model, 1), tokenizer, samples)
    assert together == alone and len(set(together)) > 1
    ids = torch.tensor([samples[0].pair(tokenizer).context])
    expected = model.generate(ids, max_new_tokens=passkey.GENERATED_TOKENS, do_sample=False, eos_token_id=0)
    assert together[0] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


# -- LAMBADA ------------------------------------------------------------------------------------------


def lm_eval_loglikelihood(model, tokenizer, pairs: list[tuple[str, str]], max_length: int) -> list[tuple[float, bool]]:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1, backend="causal")
    requests = [instance.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def test_lambada_equals_lm_evals_task():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    tokenizer = bytes_tokenizer()
    model = lookup_model(tokenizer, {"y": "Ġ", "Ġ": "a", "a": "b"}, logit=4.0)
    texts = ["x y ab", "x y abc", "so it goes, y ab", "y a", f"{PROSE.strip()} y ab", "two  spaces before y  ab"]
    pairs = [(" ".join(text.split(" ")[:-1]), " " + text.split(" ")[-1]) for text in texts]  # as in the task's yaml
    theirs = lm_eval_loglikelihood(model, tokenizer, pairs, 64)
    answers = score_continuations(engine(model), [last_word(tokenizer, text) for text in texts], 64)
    for ours, (loglikelihood, greedy) in zip(answers, theirs, strict=True):
        assert -ours.nll == pytest.approx(loglikelihood, rel=RELATIVE)
        assert ours.greedy == greedy
    result = score_lambada(engine(model), tokenizer, texts, 64)
    assert result["lambada_perplexity"] == pytest.approx(metrics.perplexity([ll for ll, _ in theirs]), rel=RELATIVE)
    assert result["lambada_accuracy"] == 100 * sum(greedy for _, greedy in theirs) / len(texts)
    assert 0 < result["lambada_accuracy"] < 100 and result["lambada_truncated"] == 1


# No two pairs of one text: lm-eval 0.4.13 scores " fox" after "The quick brown" with the logits that it kept for
# " brown fox" after "The quick".
def test_long_contexts_are_truncated_on_the_left_as_in_lm_eval():
    tokenizer, model = bpe_tokenizer(), tiny()
    pairs = [("The quick brown", " fox"), ("Where a ", "layer has"), (PROSE, " and so on"), ("a", "b c")]
    theirs = lm_eval_loglikelihood(model, tokenizer, pairs, 12)
    answers = score_continuations(engine(model, 24), [encode_pair(tokenizer, *pair) for pair in pairs], 12)
    assert [answer.truncated for answer in answers] == [False, False, True, False]
    assert [-a.nll for a in answers] == pytest.approx([ll for ll, _ in theirs], rel=RELATIVE)


def test_bos_precedes_contexts_and_prompts_as_in_lm_eval():
    """Llama and Gemma were trained with it: without it their results, as a baseline, are far too low."""
    tokenizer, model = with_bos(bytes_tokenizer()), tiny()
    pairs = [("The quick brown", " fox"), ("Where a ", "layer has")]
    theirs = lm_eval_loglikelihood(model, tokenizer, pairs, 64)
    answers = score_continuations(engine(model), [encode_pair(tokenizer, *pair) for pair in pairs], 64)
    assert [-a.nll for a in answers] == pytest.approx([ll for ll, _ in theirs], rel=RELATIVE)
    (sample,) = make_samples(tokenizer, [1200], (50,), 1)
    pair = sample.pair(tokenizer)
    assert pair.context.count(tokenizer.bos_token_id) == 1 and pair.context[0] == tokenizer.bos_token_id
    assert tokenizer.decode(pair.target) == f" {sample.value}" and len(pair.sequence) <= 1200


def test_text_of_one_word_has_no_last_word():
    with pytest.raises(DataError, match="LAMBADA"):
        last_word(bpe_tokenizer(), "word")


# -- samples ------------------------------------------------------------------------------------------


def test_repetition_worked_by_hand():
    assert repetition_rate([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition_rate([7] * 11) == pytest.approx(7 / 8)
    assert repetition_rate([1, 2]) == 0.0


def test_samples_are_deterministic_and_ignore_the_models_generation_config():
    tokenizer, model = bpe_tokenizer(), tiny()
    first = generation_samples(model, tokenizer, 12, seed=3)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 4
    assert generation_samples(model, tokenizer, 12, seed=3) == first
    assert model.generation_config.repetition_penalty == 5.0
    other = generation_samples(model, tokenizer, 12, seed=4)
    assert [s["greedy"] for s in other] == [s["greedy"] for s in first]
    assert [s["sampled"] for s in other] != [s["sampled"] for s in first]
    assert all(math.isfinite(sample["greedy_repetition"]) for sample in first)
