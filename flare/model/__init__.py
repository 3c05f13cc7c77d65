"""The model in training: attention kernels, memory-efficient layers, activation checkpointing, compilation, loss."""
