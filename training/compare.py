"""Compare candidate, champion and base on the same held-out records, in processes of their own: the ranks, together.

In: RUN/config.yaml and RUN/gate-job.json (`Job`). Out: RUN/gate.json (the verdict and its tables) and
RUN/report/gate_records.jsonl (the losses of every record under every model). By hand: ``python -m training.compare
--config RUN/config.yaml``. One set of weights at a time is in memory, each rank's share of it; adapters of one base are
switched on it. Benchmarks are asked last, by the first rank alone, which loads each model once more.
"""

import argparse
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data_prep.errors import PandaError
from data_prep.inspection import overlap
from training import run_files
from training.comparison import heldout, metrics, statistics
from training.comparison.heldout import HeldOut
from training.comparison.intervals import CONFIDENCE
from training.comparison.job import Answer, GateResult, Job, ModelUnderTest, OverlapRow, read_job
from training.comparison.scores import Asking, score
from training.comparison.statistics import Scores
from training.devices import compute_dtype
from training.distributed import Ranks, join, leave, this_rank
from training.engines.inference import UsedModel, in_use
from training.launch.exits import run_rank
from training.launch.heartbeat import beating
from training.launch.run_config import RunConfig, read_config
from training.models.build import Empty, empty_weights, put_adapter
from training.models.hub import base_of
from training.settings import GateSettings

log = logging.getLogger(__name__)


def run_job(config: RunConfig, job: Job, ranks: Ranks) -> GateResult:
    """Score every model, reach a verdict; returns what RUN/gate.json holds. All ranks together."""
    settings = GateSettings(**job.gate)
    held_out, problems = records_of(config, job, settings)
    with beating("texts that were trained on"):
        held_out, overlaps = unseen(held_out, config.plan_dir, settings.max_overlap)
    rows, num_prompts = config.settings.per_gpu_eval_batch_size, settings.gate_prompts
    asking = Asking(rows, ranks, Path(job.cache_dir), config.train_on, config.reasoning, num_prompts)
    scores, answers = score_all(config, job, held_out, asking, problems)
    if ranks.is_first:  # nothing that all ranks do comes after this
        for role, one in measured(config, job, settings, held_out, answers, overlaps).items():
            scores[role].metrics.update(one)
    candidate = scores.pop("candidate")
    names = {role: one.name for role, one in job.models.items()}
    others = {role: (names[role], one) for role, one in scores.items()}
    verdict = statistics.reach_verdict(
        settings, held_out.slices(), candidate, others, held_out.num_excluded, held_out.elsewhere(),
        metrics.measures(settings),
    )  # fmt: skip
    if overlaps and others and not held_out.num_own:
        reason = "all held-out records are nearly in what it was trained on (max_overlap), so nothing can be compared"
        verdict = replace(verdict, promoted=False, reasons=[reason])
    decisive = "champion" if job.champion else "base"
    if decisive in problems:
        verdict = replace(verdict, promoted=False, reasons=[problems[decisive]])
    if ranks.is_first:
        write_records(config.run_dir, held_out, {"candidate": candidate, **scores})
    return {
        **asdict(verdict),  # type: ignore[typeddict-item]  # it has the first five keys
        **names,
        "records": held_out.num_own,
        "records_elsewhere": held_out.num_elsewhere,
        "records_digest": held_out.digest,
        "excluded_records": held_out.num_excluded,
        "confidence": CONFIDENCE,
        "settings": settings.model_dump(),
        "overlaps": overlaps,
        "problems": problems,
        "asked": held_out.texts_of_prompts(settings.gate_prompts),
        "answers": answers,
    }


def unseen(held_out: HeldOut, plan_dir: Path, max_overlap: float) -> tuple[HeldOut, list[OverlapRow]]:
    """The records without those that the candidate was trained on, nearly; and these."""
    texts = ["\n".join(texts) for texts in held_out.texts.to_pylist()]
    found = overlapping(held_out.places, texts, plan_dir, max_overlap)
    return held_out.without(found), list(found.values())


def overlapping(names: list[str], texts: list[str], plan_dir: Path, max_overlap: float) -> dict[int, OverlapRow]:
    """Those of the named texts that a training record holds, to that share or more, by their number."""
    found = enumerate(overlap.find(texts, plan_dir))
    return {
        number: {"record": names[number], "trained": one.place, "share": one.share}
        for number, one in found
        if one and one.share >= max_overlap
    }


def records_of(config: RunConfig, job: Job, settings: GateSettings) -> tuple[HeldOut, dict[str, str]]:
    """This corpus' held-out records, those of the champion, neutral texts; and why some of them are not there."""
    problems: dict[str, str] = {}
    seen: set[str] = set()
    found = None
    if job.champion_plan:
        seen = heldout.trained_hashes(Path(job.champion_plan))
        try:
            trained = heldout.trained_hashes(config.plan_dir)
            found = heldout.before(Path(job.champion_plan), settings.gate_records, trained)
        except (PandaError, OSError) as error:  # parts of the cache may have been deleted
            problems["records of the champion"] = f"what was held out for the champion cannot be read: {error}"
            log.warning("%s", problems["records of the champion"])
    held_out = heldout.choose(config.plan_dir, settings.gate_records, seen)
    held_out = held_out.with_others(found) if found else held_out
    if not held_out.num_own:  # nothing can be promoted, so nothing needs to be asked
        return held_out, problems
    return held_out.with_others(
        heldout.neutral(Path(settings.neutral_texts) if settings.neutral_texts else None)
    ), problems


def measured(  # noqa: PLR0913, PLR0917  # what the stages before it have left
    config: RunConfig,
    job: Job,
    settings: GateSettings,
    held_out: HeldOut,
    answers: dict[str, list[Answer]],
    overlaps: list[OverlapRow],
) -> dict[str, dict[str, np.ndarray]]:
    """Role -> the values of the user's metrics on its answers, and of benchmarks on their questions.

    A question that was trained on has none, and is added to `overlaps`.
    """
    asked = held_out.texts_of_prompts(settings.gate_prompts)
    found = {role: metrics.of_answers(settings, asked, [one["text"] for one in said]) for role, said in answers.items()}
    for task, entry in (settings.gate_benchmarks or {}).items():
        from training.registry import benchmark  # with MLflow, which this process needs for nothing else

        for role, values in found.items():
            with beating(f"benchmark {task}"):
                files, trusted = job.models[role].files, config.settings.trust_remote_code
                values[f"{metrics.BENCHMARK}{task}"], texts = benchmark.item_values(files, task, entry, trusted)
        names = [f"benchmark {task}, question {number}" for number in range(1, len(texts) + 1)]
        rows = overlapping(names, texts, config.plan_dir, settings.max_overlap)
        for values in found.values():
            values[f"{metrics.BENCHMARK}{task}"][list(rows)] = np.nan
        overlaps += rows.values()
    return found


@dataclass(frozen=True)
class Weights:
    """What is loaded once, for all models that are made of it."""

    directory: Path
    quantised: bool


def score_all(
    config: RunConfig, job: Job, held_out: HeldOut, asking: Asking, problems: dict[str, str]
) -> tuple[dict[str, Scores], dict[str, list[Answer]]]:
    """Scores and generations by role; `problems` gets why a champion or base could not be asked."""
    scores: dict[str, Scores] = {}
    answers: dict[str, list[Answer]] = {}
    for role, model in models_of(config, job, len(held_out), asking.ranks, problems):
        one = job.models[role]
        with asked_about(role, one, problems):
            log.info("scoring %s (%s)", one.name, one.files)
            nothing: tuple[Scores, list[Answer]] = (statistics.nothing_asked(), [])
            scores[role], answers[role] = score(model, one, held_out, asking) if model else nothing
        del model  # the next weights need its room
    order = [role for role in job.models if role in scores]
    return {role: scores[role] for role in order}, {role: answers[role] for role in order}


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
                "slice": str(held_out.names[i]),
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
