"""One forward pass over a checkpoint, shared by all analyzers."""
