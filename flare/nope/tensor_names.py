"""Names of a dense Qwen's tensors: all tensors of a checkpoint, and those that scale a layer's queries."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def tensor_names(family: str, config: dict) -> set[str]:
    """Every tensor of a Qwen2 or Qwen3 causal LM; a tied lm_head does not count."""
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"]
    layer += [f"self_attn.{name}.weight" for name in PROJECTIONS]
    layer += [f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    if family == "qwen2" or config.get("attention_bias"):
        layer += [f"self_attn.{name}.bias" for name in PROJECTIONS]
    if family == "qwen3":
        layer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        layer += ["self_attn.o_proj.bias"] if config.get("attention_bias") else []
    names = {f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in layer}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    return names if config.get("tie_word_embeddings") else names | {"lm_head.weight"}


def o_proj_biases(num_hidden_layers: int) -> list[str]:
    """The biases that SmolLM3 has and Qwen2 does not have."""
    return [f"model.layers.{i}.self_attn.o_proj.bias" for i in range(num_hidden_layers)]


def query_tensors(family: str, layers: list[int]) -> list[str]:
    """The tensors that scale a layer's queries, and so its attention scores.

    Qwen3 normalises the queries after q_proj, which would undo a factor there; q_norm's weight is scaled instead.
    """
    names = ("q_norm.weight",) if family == "qwen3" else ("q_proj.weight", "q_proj.bias")
    return [f"model.layers.{i}.self_attn.{name}" for i in layers for name in names]
