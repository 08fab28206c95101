"""trace-offline: measure what a language model learned, checkpoint by checkpoint, after training."""
