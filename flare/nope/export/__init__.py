"""Models in architectures that stock runtimes know, and back to RoPE everywhere."""
