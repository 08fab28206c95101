"""Where the weights of a run live: finding, identifying and loading its checkpoints."""
