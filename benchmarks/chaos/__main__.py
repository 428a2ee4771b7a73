"""`python -m benchmarks.chaos`: the table. Exit code 1 if anything was lost, wrong, orphaned or untyped."""

import argparse
import logging
import sys

from benchmarks.chaos.findings import failures, table


def main() -> int:
    """Play the cases, print what was found."""
    from benchmarks.chaos import cases
    from benchmarks.chaos.victims import hatchery

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, help="at most so many seeds of each case")
    parser.add_argument(
        "--case", action="append", choices=list(cases.CASES | cases.LONG), help="only this one; may be given again"
    )
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what is refused says so in the log, a thousand times
    names = arguments.case or list(cases.CASES)
    with hatchery():
        rows, found = cases.play(
            names,
            arguments.seed,
            arguments.minutes,
            arguments.rounds,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(table(rows))
    if found:
        print(failures(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
