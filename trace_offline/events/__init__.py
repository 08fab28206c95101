"""Phases of a history as numbers: what happened when, which came first, and when training could have stopped."""
