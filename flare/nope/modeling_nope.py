"""Qwen2 and Qwen3 with rotary position embedding (RoPE) left out of chosen layers ("NoPE layers").

This file travels inside every model that Flare writes and needs nothing but transformers:

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

``config.nope_layers`` lists the decoder layers (0-based) whose attention ignores positions. The
``model_type`` is our own on purpose: stock transformers, which would put RoPE back without a word,
refuses to open such a checkpoint. ``_auto_class`` makes ``save_pretrained`` copy this file beside the weights.
Written for transformers 4.57 and 5.x.
"""

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


def _attend(attention, query, key, value, attention_mask, eager, **kwargs):
    """Call the attention implementation that the config names, as the stock layer does."""
    implementation = attention.config._attn_implementation
    attend = eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    return attend(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=attention.sliding_window,
        **kwargs,
    )


def _nope_forward(attention, hidden_states, attention_mask, past_key_values, eager, kwargs):
    """The stock attention forward without ``apply_rotary_pos_emb``.

    hidden_states: (B, T, H) -> (attention output (B, T, H), attention weights or None).
    """
    heads_shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    query = attention.q_proj(hidden_states).view(heads_shape)
    key = attention.k_proj(hidden_states).view(heads_shape)
    if hasattr(attention, "q_norm"):  # Qwen3 normalises each head
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    value = attention.v_proj(hidden_states).view(heads_shape).transpose(1, 2)
    if past_key_values is not None:
        # transformers 4.57's static cache needs the positions to write at; 5.x keeps count itself.
        where = {"cache_position": kwargs["cache_position"]} if "cache_position" in kwargs else None
        extra = (where,) if where is not None else ()
        key, value = past_key_values.update(key, value, attention.layer_idx, *extra)
    output, weights = _attend(attention, query, key, value, attention_mask, eager, **kwargs)
    output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
    return attention.o_proj(output), weights


class Qwen2NopeAttention(Qwen2Attention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        eager = modeling_qwen2.eager_attention_forward
        return _nope_forward(self, hidden_states, attention_mask, past_key_values, eager, kwargs)


class Qwen3NopeAttention(Qwen3Attention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        eager = modeling_qwen3.eager_attention_forward
        return _nope_forward(self, hidden_states, attention_mask, past_key_values, eager, kwargs)


NOPE_ATTENTION = {Qwen2Attention: Qwen2NopeAttention, Qwen3Attention: Qwen3NopeAttention}


def remove_rope(decoder, nope_layers):
    """Turn the attention of ``nope_layers`` of this one decoder into NoPE attention; weights stay.

    Raises ValueError when the list is missing or names layers that the model has not: a checkpoint that
    lies about its layers must not open.
    """
    depth = len(decoder.layers)
    layers = list(nope_layers or [])
    if not layers or len(set(layers)) != len(layers) or any(not 0 <= i < depth for i in layers):
        raise ValueError(f"nope_layers={nope_layers} is not a set of layers of 0..{depth - 1}")
    for index in layers:
        attention = decoder.layers[index].self_attn
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
