"""How a model is scored: perplexity, longer contexts, passkeys, LAMBADA, generation."""
