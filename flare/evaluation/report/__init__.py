"""The output of an evaluation: comparison, verdict, Markdown report, plots and TensorBoard events."""
