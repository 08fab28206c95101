"""Plan what is missing, run it over checkpoints in parallel, hand outcomes to the store."""
