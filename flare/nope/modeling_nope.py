"""Qwen2 and Qwen3 with rotary position embedding (RoPE) left out of chosen layers ("NoPE layers").

This file travels inside every model that Flare writes and needs nothing but transformers:

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

``config.nope_layers`` lists the decoder layers (0-based) whose attention ignores positions. The
``model_type`` is our own on purpose: stock transformers, which would put RoPE back silently,
refuses to open such a checkpoint. ``_auto_class`` makes ``save_pretrained`` copy this file next to the weights.
Written for transformers 4.57 to 5.24. With a newer one it opens only if the attention layers take no new argument.
"""

import inspect

import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model


class Qwen2NopeConfig(Qwen2Config):
    model_type = "qwen2_nope"
    _auto_class = "AutoConfig"
    nope_layers: list[int] | None = None


class Qwen3NopeConfig(Qwen3Config):
    model_type = "qwen3_nope"
    _auto_class = "AutoConfig"
    nope_layers: list[int] | None = None


KNOWN_ARGUMENTS = {
    "self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache", "cache_position",
    "position_ids", "kwargs",
}  # fmt: skip
"""Arguments of the stock attention layers up to transformers 5.24, which the layers below understand."""


def _check_arguments(attention_class):
    """Raise ImportError for a transformers whose attention takes an argument that this file does not know.

    The argument would be ignored silently. In 5.24 ``past_key_values`` became ``cache``: a file that knows only the
    old name decodes without its cache, so that each new token attends to itself alone.
    """
    unknown = set(inspect.signature(attention_class.forward).parameters) - KNOWN_ARGUMENTS
    if unknown:
        raise ImportError(
            f"transformers {transformers.__version__}: {attention_class.__name__} takes {', '.join(sorted(unknown))}, "
            "which modeling_nope.py of this model does not know; use transformers 5.24, or write a newer file with "
            "Flare: python patch_qwen_rope.py --refresh DIRECTORY"
        )


def _cache_arguments(kwargs):
    """What ``Cache.update`` takes after the layer: 4.57's static cache needs the positions to write at."""
    return ({"cache_position": kwargs["cache_position"]},) if "cache_position" in kwargs else ()


class Qwen2NopeAttention(Qwen2Attention):
    """Qwen2's attention without ``apply_rotary_pos_emb``.

    ``forward`` is written out in the class because vLLM reads its source. The cache is called ``past_key_values`` up
    to transformers 5.23, and ``cache`` from 5.24 on.
    """

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        """hidden_states: (B, T, H) -> (attention output (B, T, H), attention weights or None)."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, *_cache_arguments(kwargs))
        attention_interface = modeling_qwen2.eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class Qwen3NopeAttention(Qwen3Attention):
    """Qwen3's attention without ``apply_rotary_pos_emb``; as Qwen2's, with each head normalised."""

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, cache=None, **kwargs
    ):
        """hidden_states: (B, T, H) -> (attention output (B, T, H), attention weights or None)."""
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, *_cache_arguments(kwargs))
        attention_interface = modeling_qwen3.eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


NOPE_ATTENTION = {Qwen2Attention: Qwen2NopeAttention, Qwen3Attention: Qwen3NopeAttention}


def remove_rope(decoder, nope_layers):
    """Turn the attention of ``nope_layers`` of this one decoder into NoPE attention; weights stay.

    Raises ValueError when the list is missing or names layers that the model does not have, so that a checkpoint whose
    list is wrong does not open. Raises ImportError for a transformers that this file was not written for.
    """
    depth = len(decoder.layers)
    layers = list(nope_layers or [])
    if not layers or len(set(layers)) != len(layers) or any(not 0 <= i < depth for i in layers):
        raise ValueError(f"nope_layers={nope_layers} is not a set of layers of 0..{depth - 1}")
    for index in layers:
        attention = decoder.layers[index].self_attn
        _check_arguments(type(attention))
        attention.__class__ = NOPE_ATTENTION.get(type(attention), type(attention))


class Qwen2NopeModel(Qwen2Model):
    config_class = Qwen2NopeConfig

    def __init__(self, config):
        super().__init__(config)
        remove_rope(self, config.nope_layers)


class Qwen2NopeForCausalLM(Qwen2ForCausalLM):
    config_class = Qwen2NopeConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config):
        super().__init__(config)
        remove_rope(self.model, config.nope_layers)


class Qwen3NopeModel(Qwen3Model):
    config_class = Qwen3NopeConfig

    def __init__(self, config):
        super().__init__(config)
        remove_rope(self, config.nope_layers)


class Qwen3NopeForCausalLM(Qwen3ForCausalLM):
    config_class = Qwen3NopeConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config):
        super().__init__(config)
        remove_rope(self.model, config.nope_layers)
