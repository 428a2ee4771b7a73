"""What looks after deployed runs when nobody does: crashed ones are started again, what does not happen is told."""
