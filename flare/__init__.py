"""Flare: staged continued pretraining of Qwen models with NoPE layers."""

__version__ = "0.1.0"
