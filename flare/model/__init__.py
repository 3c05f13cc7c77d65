"""The model as it is trained: weights, attention kernels, memory-efficient layers, checkpointing, compilation."""
