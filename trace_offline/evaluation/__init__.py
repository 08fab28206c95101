"""Fixed evaluation sets: format, builders, alignment of words to tokens."""
