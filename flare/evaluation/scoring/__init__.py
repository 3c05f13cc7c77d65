"""Metrics of a model: perplexity, context lengths, passkeys, LAMBADA and generation."""
