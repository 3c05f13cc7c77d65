"""NoPE layers: which ones, how a model leaves RoPE out of them, and the proof that it does."""
