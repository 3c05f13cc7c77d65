"""Recorded log-probabilities that show which model a directory contains or a server runs."""
