"""Checkpoints on disk. ``python -m flare.checkpoint`` lists and verifies them."""
