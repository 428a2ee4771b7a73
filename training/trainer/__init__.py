"""What a rank does: batches in order, steps, evaluation, checkpoints."""
