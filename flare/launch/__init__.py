"""Starts worker processes through torchrun's agent, on one node or several."""
