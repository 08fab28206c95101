"""What every stage shares: value types, errors, hashing, parameters. Loads neither torch nor duckdb."""
