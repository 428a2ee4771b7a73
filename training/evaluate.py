"""Evaluate the model that a run has written: what is deployed, read back from disk by the ranks, as it was trained.

In: RUN/config.yaml, RUN/model, the validation rows of the plan, RUN/train.json. Out: RUN/evaluation.json, `{source:
{loss, perplexity, target_tokens}}`. Training has computed all held-out losses with the weights that it had in memory,
and those of a sample of rows for themselves. The weights on disk have to give the losses of the sample again; then the
numbers of training are theirs. With ``--all``, and where training has left no sample (older runs), all rows are
computed here. By hand: ``python -m training.evaluate --config RUN/config.yaml``. No DeepSpeed is imported. Cost: the
weights (of each rank its share), and a few forward passes.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from data_prep.plan.reader import Plan, open_plan
from training import run_files
from training.devices import compute_dtype
from training.distributed import Ranks, join, leave, this_rank
from training.engines.inference import load_for_inference
from training.errors import ModelError
from training.launch.exits import run_rank
from training.launch.run_config import RunConfig, read_config
from training.run_files import HeldOut
from training.trainer.evaluation import ALL, held_out_losses, sample_rows

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Relative difference of the loss of a sample: other kernels add in another order, weights are rounded once more."""


def evaluate_run(config: RunConfig, ranks: Ranks, everything: bool) -> HeldOut:
    """Held-out loss and perplexity per source of RUN/model; {} when nothing is held out. All ranks together.

    :raises ModelError: what is on disk is not what was trained.
    """
    plan = open_plan(config.plan_dir, "validation")
    if not plan.num_rows:
        return {}
    trained = run_files.read_json(config.run_dir / run_files.TRAINED)
    if everything or not trained.get("eval_sample"):
        return _losses(config, ranks, plan, None)
    sample = _losses(config, ranks, plan, sample_rows(plan.num_rows))
    check_same(trained["eval_sample"], sample, TOLERANCE[compute_dtype(config.settings, ranks.device)])
    return trained["eval_after"]


def _losses(config: RunConfig, ranks: Ranks, plan: Plan, rows: np.ndarray | None) -> HeldOut:
    model = load_for_inference(config.run_dir / run_files.MODEL, config.settings, ranks)
    batch_size = config.settings.per_gpu_eval_batch_size
    return held_out_losses(lambda batch: model(batch, "each"), plan, batch_size, ranks, rows)


def check_same(trained: HeldOut, deployed: HeldOut, tolerance: float) -> None:
    """The same weights have the same losses.

    :raises ModelError: these have not.
    """
    then, now = trained[ALL]["loss"], deployed[ALL]["loss"]
    unusable = not math.isfinite(then) and not math.isfinite(now)
    if not unusable and not abs(now - then) <= tolerance * max(abs(then), 1.0):
        raise ModelError(
            f"RUN/{run_files.MODEL} is not the model that was trained: its loss on a sample of held-out rows is "
            f"{now:.4f}, that of the weights in memory was {then:.4f} (allowed: {tolerance:.1%}); remove the "
            "directory and go on with --resume to write it again from the last checkpoint"
        )


def main() -> None:
    """Command line: evaluate, write RUN/evaluation.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    parser.add_argument("--all", action="store_true", help="compute all held-out rows, not a sample")
    arguments = parser.parse_args()
    config, ranks = read_config(arguments.config), this_rank()
    join(ranks, config.settings.stall_seconds)
    try:
        result = evaluate_run(config, ranks, arguments.all)
    finally:
        leave()
    if ranks.is_first:
        run_files.write_json(config.run_dir / run_files.EVALUATION, result)


if __name__ == "__main__":
    run_rank(main)
