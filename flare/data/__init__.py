"""From a corpus to packed rows: sources, token cache, split, packing, row order."""
