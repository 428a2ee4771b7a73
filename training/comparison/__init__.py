"""May a new version become champion? Held-out records, scores of each model, paired statistics."""
