"""What is known before a run: which settings work together, how much memory they take, how long it lasts."""
