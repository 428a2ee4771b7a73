"""What every rank runs: ``python -m training.worker --config RUN/config.yaml [--resume]``, by hand also under torchrun.

In: RUN/config.yaml and the environment of a rank (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Out: what
`training.trainer.run` writes. Rank 0 prints `PANDA {json}` events on stdout; the rest is log text. The exit code is one
of `training.launch.exits`. What a user may have got wrong is checked before torch is imported.
"""

import argparse
import logging
from pathlib import Path

from training.launch.exits import run_rank
from training.launch.run_config import RunConfig, read_config
from training.lean_imports import UNUSED, without
from training.planning import compatibility


def main() -> None:
    """Command line of a rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint of this run")
    arguments = parser.parse_args()
    config = read_config(arguments.config)
    compatibility.check(config.settings, config.model_dir, config.packing, config.max_seq_length)
    work(config, arguments.resume)


def work(config: RunConfig, resume: bool) -> None:
    """Meet the other ranks and do this one's part."""
    from training.distributed import join, leave, this_rank  # torch from here on

    ranks = this_rank()
    logging.basicConfig(
        level=logging.INFO if ranks.is_first else logging.WARNING,
        format=f"%(asctime)s rank {ranks.rank} %(name)s: %(message)s",
    )
    with without(*UNUSED):  # none of these imports is the user's code
        from training.trainer.run import train_run
    join(ranks, config.settings.stall_seconds)
    try:
        train_run(config, ranks, resume)
    finally:
        leave()


if __name__ == "__main__":
    run_rank(main)
