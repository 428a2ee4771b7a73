"""Chaos: what a machine, a disk, a network or a person does to a run, drawn by seed; what was lost by it (nothing).

    make chaos SEED=1 MINUTES=10                          all cases in turn until the time is up, then the table
    python -m benchmarks.chaos --case kill-ranks --seed 7 --rounds 1    one row of it again

It is a benchmark, because it prints a table and takes the time it is given. `cases.py` lists the cases; each is a
function of a seed and a folder that breaks something real and looks at what is left.
"""
