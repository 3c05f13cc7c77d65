"""Tiny models and tokenizers of the evaluation tests: random ones, and tables worked by hand."""

import json
import math
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flare.evaluation.scoring.perplexity import DatasetScore, score_documents

PROSE = (
    "Where a layer has no rotary embedding, attention sees a bag of keys; order comes from the layers below. "
    "The quick brown fox jumps over the lazy dog, and nobody has ever asked it why it does so every day.\n"
)


def byte_level(backend: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", **kwargs)


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with some merges, eos and no bos, as Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE], trainer)
    return byte_level(backend)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return byte_level(Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [])))


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that puts ``<s>`` in front of every text, as Llama's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    copy = byte_level(backend, bos_token="<s>")
    assert copy("a")["input_ids"][0] == start[1]
    return copy


def tiny(model_type: str = "qwen2", **overrides):
    """A random causal LM of transformers whose loss varies much between tokens."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **(sizes | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def lookup_model(tokenizer, followers: dict[str, str], logit: float):
    """A Qwen2 that is a table: after a token of ``followers`` its follower has ``logit``, all else is 0.

    One-hot embeddings, attention and MLP that add nothing, a norm undone by the head.
    """
    size = len(tokenizer)
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny(vocab_size=size, hidden_size=size, head_dim=8, rms_norm_eps=0.0, **heads)
    index = tokenizer.convert_tokens_to_ids
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, follower in followers.items():
            model.lm_head.weight[index(follower), index(token)] = logit / math.sqrt(size)
    return model


def score(model, tokenizer, texts: list[str], **overrides) -> DatasetScore:
    """``score_documents`` in small windows on the CPU."""
    settings = {"max_length": 16, "batch_size": 4, "device": "cpu"}
    return score_documents(model, tokenizer, texts, **(settings | overrides))


def write_rows(file: Path, *values: object) -> Path:
    """A JSON Lines file with one row for each value."""
    file.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return file
