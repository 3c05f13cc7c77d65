"""Recorded log-probabilities that tell which model a directory or a server holds."""
