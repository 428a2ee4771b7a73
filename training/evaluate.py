"""Evaluate the model that a run has written: what is deployed, read back from disk.

In: RUN/config.yaml, RUN/model, the validation rows of the plan. Out: RUN/evaluation.json, `{source: {loss, perplexity,
target_tokens}}`. By hand: ``python -m training.evaluate --config RUN/config.yaml``. One process; no DeepSpeed is
imported.
"""

import argparse
from pathlib import Path
from typing import Any

from data_prep.plan.reader import open_plan
from training import run_files
from training.devices import compute_dtype
from training.distributed import join, leave, this_rank
from training.launch.exits import run_rank
from training.launch.run_config import read_config
from training.models.build import load_deployed
from training.models.loss import CausalLMLoss
from training.settings import TrainSettings
from training.trainer.evaluation import held_out_losses


def evaluate_model(model_dir: Path, plan_dir: Path, settings: TrainSettings) -> dict[str, Any]:
    """Held-out loss and perplexity per source of a model directory; {} when nothing is held out."""
    plan = open_plan(plan_dir, "validation")
    if not plan.num_rows:
        return {}
    ranks = this_rank()
    join(ranks)
    try:
        model = CausalLMLoss(load_deployed(model_dir, compute_dtype(settings, ranks.device)).to(ranks.device))
        return held_out_losses(lambda batch: model(batch, "each"), plan, settings.per_gpu_eval_batch_size, ranks)
    finally:
        leave()


def main() -> None:
    """Command line: evaluate, write RUN/evaluation.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    config = read_config(parser.parse_args().config)
    result = evaluate_model(config.run_dir / run_files.MODEL, config.plan_dir, config.settings)
    run_files.write_json(config.run_dir / run_files.EVALUATION, result)


if __name__ == "__main__":
    run_rank(main)
