"""Measuring a causal LM: scores, the results file, the report, plots, TensorBoard.

    scorer.py       model -> NLL and argmax hit of every target; knows how to keep the logits small
    windows.py      document -> windows of tokens; what a protocol is
    perplexity.py   documents -> DatasetScore: sums over windows, the metrics and their definitions
    results.py      evaluation_results.json
    rows.py         one model on one data set; which control is a fair one
    verdict.py      several results -> what they say, in plain words
    plots.py, report.py, tensorboard.py   results -> PNG, Markdown, events

Everything takes ready objects (a transformers causal LM, its tokenizer, texts), so that a base model and
ours go through the same code. Loading belongs to ``flare.nope``, reading texts to ``flare.data``.
"""
