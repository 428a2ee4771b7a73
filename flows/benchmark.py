"""`panda benchmark VERSION --tasks ...`: ask a registered version lm-eval's tasks; the scores go to MLflow.

In: a version, names of tasks. Out: a table, or one JSON object with ``--json``; metrics and tags in MLflow. Cost: see
`training.benchmark`.
"""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.flags import Switch
from data_prep.errors import PandaError
from flows.json_line import print_json
from flows.registry_cli import parse_verb
from training.benchmark import Questions, Score, ask, record

SWITCHES = (
    Switch("tasks", "Names of tasks, separated by commas, for example hellaswag,arc_easy.", {"metavar": "NAMES"}),
    Switch("task_dir", "Directory with task files (YAML) of your own.", {"metavar": "DIR", "type": Path}),
    Switch("num_fewshot", "Examples in front of each question; not given = as the task says.", {"type": int}),
    Switch("limit", "Ask only the first N records of each task, to try.", {"metavar": "N", "type": int}),
    Switch("chat_template", "Ask through the model's chat template, as instruction models want it."),
    Switch("batch_size", "Questions at a time (8).", {"type": int, "default": 8}),
    Switch("base", "Directory of the base model of an adapter, if it has moved.", {"metavar": "DIR", "type": Path}),
)


def main(argv: list[str]) -> int:
    """Ask a version, write down what it scored."""
    verb = parse_verb("panda benchmark VERSION", "Ask a version lm-eval's tasks; scores go to MLflow.", argv, SWITCHES)
    given = verb.switches
    if not given.tasks:
        raise PandaError("name the tasks, for example --tasks hellaswag,arc_easy")
    version = verb.registry.resolve(verb.words[0])
    questions = Questions(
        [name.strip() for name in given.tasks.split(",")], given.task_dir, given.num_fewshot, given.limit,
        given.chat_template, given.batch_size,
    )  # fmt: skip
    scores, report = ask(verb.registry.files(version, verb.cache_dir), questions, given.base)
    record(verb.registry, version, scores, report)
    if given.json:
        print_json({"version": version.uri, "scores": [asdict(score) for score in scores]})
    else:
        Console(highlight=False).print(table(scores))
    return 0


def table(scores: list[Score]) -> Table:
    """A line for each metric."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "metric", "value", "±", "shots", "records"):
        lines.add_column(heading, no_wrap=True)
    for score in scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        records = f"{score.records} of {score.available}"
        lines.add_row(score.task, score.metric, f"{score.value:.4f}", error, str(score.shots), records)
    return lines
