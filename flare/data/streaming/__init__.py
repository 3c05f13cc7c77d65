"""Corpora larger than the disk: tokenised ahead of the training, into a window that moves with it.

pieces -> worker processes (segments) -> one order (lanes) -> blocks of rows on disk -> the trainer. One producer
process a host does all but the last arrow; docs/design.md says why.
"""
