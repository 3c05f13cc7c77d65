"""What an evaluation says: comparison, verdict, Markdown report, plots, TensorBoard."""
