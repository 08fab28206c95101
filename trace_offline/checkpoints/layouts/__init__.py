"""One module per layout of checkpoints; each recognises a folder or file and never opens a pickle."""
