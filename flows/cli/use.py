"""`panda export`, `chat`, `serve`: use a registered version, as files, in the terminal, or behind an endpoint.

In: a version. Out: a directory, a conversation, or a running server. The server is an existing one (vLLM where it is
installed, else `transformers serve`), on the loopback device unless told otherwise; this process becomes it. Cost: that
of loading the model; an adapter is merged once for serving and kept in the cache.

`panda benchmark VERSION --tasks ...`: ask a registered version lm-eval's tasks; the scores go to MLflow.

In: a version, names of tasks. Out: a table, or one JSON object with ``--json``; metrics and tags in MLflow. Cost: see
`training.registry.benchmark`.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from configs.cli import Switch
from data_prep.errors import PandaError
from flows.cli.console import stdout_console
from flows.cli.registry import Verb, parse_verb
from flows.cli.run import print_json
from training.export.export import to_gguf
from training.models.hub import base_of
from training.registry.benchmark import Questions, Score, ask, record
from training.registry.publish import publish
from training.registry.versions import Version

BASE = Switch("base", "Directory of the un-quantised base model of an adapter, if it has moved.", {"metavar": "DIR"})
GGUF = Switch("gguf", "Also write a GGUF file, with llama.cpp's converter.")
MAX_NEW_TOKENS = Switch("max_new_tokens", "Tokens of an answer at most (256).", {"type": int, "default": 256})
TEMPERATURE = Switch("temperature", "0 = always the likeliest token (0).", {"type": float, "default": 0.0})
SYSTEM = Switch("system", "System message in front of the conversation.", {"metavar": "TEXT"})
HOST = Switch("host", "Address to listen on (127.0.0.1: this machine only).", {"default": "127.0.0.1"})
PORT = Switch("port", "Port to listen on (8000).", {"type": int, "default": 8000})


def export(argv: list[str]) -> int:
    """Write a version as a plain model directory."""
    text = "Write a version to a new directory for transformers, vLLM and others; an adapter is merged into its base."
    verb = parse_verb("panda export VERSION DIRECTORY", text, argv, (BASE, GGUF))
    base = Path(verb.switches.base) if verb.switches.base else None
    version = verb.registry.resolve(verb.words[0])
    done = publish(verb.registry, version, Path(verb.words[1]), verb.cache_dir, base)
    gguf = to_gguf(Path(done.path)) if verb.switches.gguf else None
    if verb.switches.json:
        print_json({"version": version.uri, **done.as_dict(), "gguf": gguf and str(gguf)})
        return 0
    print(f"{version.uri} is in {done.path} ({done.kind})")
    if done.difference:
        found = done.difference
        print(f"merged against adapter: mean KL {found.mean_kl:.1e} nats, same next token {found.top1_agreement:.1%}")
    return 0


def chat(argv: list[str]) -> int:
    """Talk to a version."""
    text = "Talk to a version in the terminal."
    verb = parse_verb("panda chat VERSION", text, argv, (MAX_NEW_TOKENS, TEMPERATURE, SYSTEM))
    version = verb.registry.resolve(verb.words[0])
    from training.export.chat import HELP
    from training.export.chat import chat as talk
    from training.registry.register import load_served

    served = load_served(version.uri, verb.registry.uri).unwrap_python_model()
    options = {"max_new_tokens": verb.switches.max_new_tokens, "max_tokens": 0, "top_p": 1.0,
               "temperature": verb.switches.temperature}  # fmt: skip
    print(f"{version.uri}: {HELP}", file=sys.stderr)
    talk(served, _lines(), options, verb.switches.system, lambda words: print(words, end="", flush=True))
    return 0


def _lines() -> Iterator[str]:
    """What a person types, with a prompt; or what is piped in."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def serve(argv: list[str]) -> int:
    """Offer an OpenAI-compatible endpoint."""
    text = "Serve a version at http://HOST:PORT/v1 (OpenAI's protocol), with vLLM if installed, else transformers."
    verb = parse_verb("panda serve VERSION", text, argv, (HOST, PORT, BASE))
    model_dir = servable(verb, verb.registry.resolve(verb.words[0]))
    command = server_command(model_dir, verb.switches.host, verb.switches.port)
    where = f"http://{verb.switches.host}:{verb.switches.port}/v1"
    print(f"serving at {where}; clients name the model {str(model_dir)!r}", file=sys.stderr, flush=True)
    os.execv(command[0], command)


def servable(verb: Verb, version: Version) -> Path:
    """A directory of whole weights: the registry's own, or the merged adapter in the cache."""
    model_dir = verb.registry.files(version, verb.cache_dir)
    if base_of(model_dir) is None:
        return model_dir
    target = verb.cache_dir / "merged" / version.source.removeprefix("models:/")
    if not target.exists():
        base = Path(verb.switches.base) if verb.switches.base else None
        publish(verb.registry, version, target, verb.cache_dir, base)
    return target


def server_command(model_dir: Path, host: str, port: int) -> list[str]:
    """The command line of vLLM or of transformers' own server, whichever is installed here."""
    beside = Path(sys.executable).parent  # the environment need not be activated
    path = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    where = ["--host", host, "--port", str(port)]
    if vllm := shutil.which("vllm", path=path):
        return [vllm, "serve", str(model_dir), *where]
    if transformers := shutil.which("transformers", path=path):
        return [transformers, "serve", *where, str(model_dir)]
    raise PandaError("serve: neither `vllm` nor `transformers` is installed; pip install 'transformers[serving]'")


SWITCHES = (
    Switch("tasks", "Names of tasks, separated by commas, for example hellaswag,arc_easy.", {"metavar": "NAMES"}),
    Switch("task_dir", "Directory with task files (YAML) of your own.", {"metavar": "DIR", "type": Path}),
    Switch("num_fewshot", "Examples in front of each question; not given = as the task says.", {"type": int}),
    Switch("limit", "Ask only the first N records of each task, to try.", {"metavar": "N", "type": int}),
    Switch("chat_template", "Ask through the model's chat template, as instruction models want it."),
    Switch("batch_size", "Questions at a time (8).", {"type": int, "default": 8}),
    Switch("base", "Directory of the base model of an adapter, if it has moved.", {"metavar": "DIR", "type": Path}),
)


def benchmark(argv: list[str]) -> int:
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
        stdout_console().print(score_table(scores))
    return 0


def score_table(scores: list[Score]) -> Table:
    """A line for each metric."""
    lines = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "metric", "value", "±", "shots", "records"):
        lines.add_column(heading, overflow="fold")
    for score in scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        records = f"{score.records} of {score.available}"
        lines.add_row(score.task, score.metric, f"{score.value:.4f}", error, str(score.shots), records)
    return lines
