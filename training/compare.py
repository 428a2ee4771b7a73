"""Compare candidate, champion and base on the same held-out records, in processes of their own: the ranks, together.

In: RUN/config.yaml and RUN/gate-job.json (`Job`). Out: RUN/gate.json (the verdict and its tables) and
RUN/report/gate_records.jsonl (the losses of every record under every model). By hand: ``python -m training.compare
--config RUN/config.yaml``. One set of weights at a time is in memory, each rank's share of it; adapters of one base are
switched on it.
"""

import argparse
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import PandaError
from training import run_files
from training.comparison import heldout, statistics
from training.comparison.heldout import HeldOut
from training.comparison.job import GateResult, Job, ModelUnderTest, read_job
from training.comparison.scores import Asking, Generation, score
from training.comparison.statistics import Scores
from training.devices import compute_dtype
from training.distributed import Ranks, join, leave, this_rank
from training.engines.inference import UsedModel, in_use
from training.launch.exits import run_rank
from training.launch.run_config import RunConfig, read_config
from training.models.build import Empty, empty_weights, put_adapter
from training.models.hub import base_of
from training.settings import GateSettings

log = logging.getLogger(__name__)


def run_job(config: RunConfig, job: Job, ranks: Ranks) -> GateResult:
    """Score every model, reach a verdict; returns what RUN/gate.json holds. All ranks together."""
    settings = GateSettings(**job.gate)
    seen = heldout.trained_hashes(Path(job.champion_plan)) if job.champion_plan else set()
    held_out = heldout.choose(config.plan_dir, settings.gate_records, seen)
    asking = Asking(config.settings.per_gpu_eval_batch_size, ranks, Path(job.cache_dir))
    scores, answers, problems = score_all(config, job, held_out, asking)
    candidate = scores.pop("candidate")
    names = {role: one.name for role, one in job.models.items()}
    others = {role: (names[role], one) for role, one in scores.items()}
    verdict = statistics.reach_verdict(settings, held_out.slices(), candidate, others, held_out.num_excluded)
    decisive = "champion" if job.champion else "base"
    if decisive in problems:
        verdict = statistics.Verdict(False, [problems[decisive]], verdict.reference, verdict.slices, verdict.checks)
    if ranks.is_first:
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


@dataclass(frozen=True)
class Weights:
    """What is loaded once, for all models that are made of it."""

    directory: Path
    quantised: bool


def score_all(
    config: RunConfig, job: Job, held_out: HeldOut, asking: Asking
) -> tuple[dict[str, Scores], dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Scores and generations by role, and why a champion or base could not be asked."""
    scores: dict[str, Scores] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, str] = {}
    for role, model in models_of(config, job, len(held_out), asking.ranks, problems):
        one = job.models[role]
        with asked_about(role, one, problems):
            log.info("scoring %s (%s)", one.name, one.files)
            nothing: tuple[Scores, list[Generation]] = (statistics.nothing_asked(), [])
            scores[role], said = score(model, one, held_out, asking) if model else nothing
            answers[role] = [asdict(generation) for generation in said]
        del model  # the next weights need its room
    order = [role for role in job.models if role in scores]
    return {role: scores[role] for role in order}, {role: answers[role] for role in order}, problems


@contextmanager
def asked_about(role: str, one: ModelUnderTest, problems: dict[str, str]) -> Iterator[None]:
    """What is wrong with a champion or base costs the promotion; what is wrong with the candidate ends this."""
    try:
        yield
    except (PandaError, OSError) as error:
        if role == "candidate":
            raise
        problems[role] = f"the {role} {one.name} cannot be asked: {error}"
        log.warning("%s", problems[role])


def models_of(
    config: RunConfig, job: Job, num_records: int, ranks: Ranks, problems: dict[str, str]
) -> Iterator[tuple[str, UsedModel | None]]:
    """Each role with its model, in use; None where there is nothing to ask."""
    for weights, roles in groups(job, problems).items():
        if not num_records:
            yield from ((role, None) for role in roles)
            continue
        dtype, trusted = compute_dtype(config.settings, ranks.device), config.settings.trust_remote_code
        empty: Empty | None = None
        first = next(iter(roles))
        with asked_about(first, job.models[first], problems):
            empty = empty_weights(weights.directory, dtype, weights.quantised, trusted)
        if empty is None:
            problems |= {role: problems[first] for role in roles}
            continue
        usable = []
        for role, adapter in roles.items():
            with asked_about(role, job.models[role], problems):
                if adapter is not None:
                    put_adapter(empty, role, adapter)
                usable.append(role)
        used = in_use(empty, ranks)
        for role in usable:
            with used.speaking_as(role if roles[role] else None):
                yield role, used
        del empty, used
        gc.collect()


def groups(job: Job, problems: dict[str, str]) -> dict[Weights, dict[str, Path | None]]:
    """Weights -> the roles that are made of them, with their adapters; the candidate's first."""
    found: dict[Weights, dict[str, Path | None]] = {}
    for role, one in job.models.items():
        with asked_about(role, one, problems):
            base = base_of(one.files)
            directory = Path(base) if base else one.files
            weights = Weights(directory.resolve() if directory.is_dir() else directory, one.quantised)
            found.setdefault(weights, {})[role] = one.files if base else None
    return found


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
    ranks = this_rank()
    logging.basicConfig(level=logging.INFO if ranks.is_first else logging.WARNING, format="%(message)s")
    torch.manual_seed(0)
    join(ranks, config.settings.stall_seconds)
    try:
        result = run_job(config, read_job(config.run_dir), ranks)
    finally:
        leave()
    if ranks.is_first:
        run_files.write_json(config.run_dir / run_files.GATE, result)


if __name__ == "__main__":
    run_rank(main)
