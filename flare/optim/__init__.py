"""Optimizers, the learning-rate schedule, and fp16's loss scale."""
