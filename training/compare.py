"""Compare candidate, champion and base on the same held-out records, in a process of its own.

In: RUN/config.yaml and RUN/gate-job.json (`Job`). Out: RUN/gate.json (the verdict and its tables) and
RUN/report/gate_records.jsonl (the losses of every record under every model). By hand: ``python -m training.compare
--config RUN/config.yaml``. One model at a time is in memory.
"""

import argparse
import gc
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import PandaError
from training import run_files
from training.comparison import heldout, statistics
from training.comparison.heldout import HeldOut
from training.comparison.job import GateResult, Job, ModelUnderTest, read_job
from training.comparison.scores import Generation, score
from training.comparison.statistics import Scores
from training.devices import any_device, compute_dtype
from training.launch.exits import run_rank
from training.launch.run_config import RunConfig, read_config
from training.settings import GateSettings

log = logging.getLogger(__name__)


def run_job(config: RunConfig, job: Job) -> GateResult:
    """Score every model, reach a verdict; returns what RUN/gate.json holds."""
    settings = GateSettings(**job.gate)
    seen = heldout.trained_hashes(Path(job.champion_plan)) if job.champion_plan else set()
    held_out = heldout.choose(config.plan_dir, settings.gate_records, seen)
    scores, answers, problems = score_all(config, job, held_out)
    candidate = scores.pop("candidate")
    names = {role: one.name for role, one in job.models.items()}
    others = {role: (names[role], one) for role, one in scores.items()}
    verdict = statistics.reach_verdict(settings, held_out.slices(), candidate, others, held_out.num_excluded)
    decisive = "champion" if job.champion else "base"
    if decisive in problems:
        verdict = statistics.Verdict(False, [problems[decisive]], verdict.reference, verdict.slices, verdict.checks)
    write_records(config.run_dir, held_out, {"candidate": candidate, **scores})
    return {
        **asdict(verdict),  # type: ignore[typeddict-item]  # it has the first four keys
        **names,
        "records": len(held_out),
        "records_digest": held_out.digest,
        "excluded_records": held_out.num_excluded,
        "confidence": statistics.CONFIDENCE,
        "settings": settings.model_dump(),
        "problems": problems,
        "answers": answers,
    }


def score_all(
    config: RunConfig, job: Job, held_out: HeldOut
) -> tuple[dict[str, Scores], dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Scores and generations by role, and why a champion or base could not be asked."""
    scores: dict[str, Scores] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    for role, one in job.models.items():
        try:
            scores[role], said = _score(config, job, one, held_out)
            answers[role] = [asdict(generation) for generation in said]
        except (PandaError, OSError) as error:
            if role == "candidate":
                raise
            problems[role] = f"the {role} {one.name} cannot be asked: {error}"
            log.warning("%s", problems[role])
        gc.collect()
    return scores, answers, problems


def _score(config: RunConfig, job: Job, one: ModelUnderTest, held_out: HeldOut) -> tuple[Scores, list[Generation]]:
    directory, dtype = one.files, compute_dtype(config.settings, any_device())
    if not len(held_out):
        return statistics.nothing_asked(), []
    log.info("scoring %s (%s)", one.name, directory)
    return score(one, held_out, config.settings.per_gpu_eval_batch_size, dtype, Path(job.cache_dir))


def write_records(run_dir: Path, held_out: HeldOut, scores: dict[str, Scores]) -> None:
    """One line per record: where it is, its slice, the loss of its whole target under every model. No text."""
    (run_dir / run_files.REPORT).mkdir(exist_ok=True)
    with (run_dir / run_files.GATE_RECORDS).open("w", encoding="utf-8") as file:
        for i, (content, place) in enumerate(zip(held_out.hashes, held_out.places, strict=True)):
            line = {
                "hash": content,
                "record": place,
                "slice": f"{held_out.sources[i]}/{held_out.languages[i]}",
                "target_tokens": int(scores["candidate"].tokens[i]),
                "loss": {role: round(float(one.losses[i]), 6) for role, one in scores.items()},
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line: compare, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="RUN/config.yaml")
    config = read_config(parser.parse_args().config)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    run_files.write_json(config.run_dir / run_files.GATE, run_job(config, read_job(config.run_dir)))


if __name__ == "__main__":
    run_rank(main)
