"""Evaluation of causal LMs: scores, results file, report, plots and TensorBoard events.

    session.py, measure.py   all models of an evaluation, and all parts measured on one of them
    scoring/                 metrics: NLL per token, perplexity, context lengths, LAMBADA, passkeys, generation
    report/                  comparison, verdict, Markdown report, plots, TensorBoard
    results.py               evaluation_results.json

Functions take a transformers causal LM, its tokenizer and texts, so that every model is measured by the same code.
"""
