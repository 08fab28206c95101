"""Pure mathematics: tensors in, numbers out; no models, no files, no database."""
