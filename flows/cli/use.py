"""`panda export`, `chat`, `serve`: use a registered version, as files, in the terminal, or behind an endpoint.

In: a version. Out: a directory, a conversation, or a running server, on the loopback device unless told otherwise.
Cost: that of loading the model.

`panda benchmark VERSION --tasks ...`: ask a registered version lm-eval's tasks; the scores go to MLflow.

In: a version, names of tasks. Out: a table, or one JSON object with ``--json``; metrics and tags in MLflow. Cost: see
`training.registry.benchmark`.
"""

import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from configs.cli import Switch
from data_prep.errors import PandaError
from flows.cli.console import stdout_console
from flows.cli.registry import Verb, parse_verb
from flows.cli.run import print_json
from training.export.export import to_gguf
from training.registry.benchmark import Questions, Score, ask, record
from training.registry.publish import Asked, publish
from training.registry.versions import Version

if TYPE_CHECKING:
    from training.serving.deployed import Deployed

BASE = Switch("base", "Directory of the un-quantised base model of an adapter, if it has moved.", {"metavar": "DIR"})
GGUF = Switch("gguf", "Also write a GGUF file, with llama.cpp's converter.")
MAX_NEW_TOKENS = Switch("max_new_tokens", "Tokens of an answer at most (256).", {"type": int, "default": 256})
TEMPERATURE = Switch("temperature", "0 = always the likeliest token (0).", {"type": float, "default": 0.0})
SYSTEM = Switch("system", "System message in front of the conversation.", {"metavar": "TEXT"})
TRUST = frozenset({"trust_remote_code"})  # the setting of training: given there, it is to be given here
HOST = Switch("host", "Address to listen on (127.0.0.1: this machine only).", {"default": "127.0.0.1"})
PORT = Switch("port", "Port to listen on (8000).", {"type": int, "default": 8000})


def export(argv: list[str]) -> int:
    """Write a version as a plain model directory."""
    text = "Write a version to a new directory for transformers, vLLM and others; an adapter is merged into its base."
    verb = parse_verb("panda export VERSION DIRECTORY", text, argv, (BASE, GGUF), TRUST)
    base = Path(verb.switches.base) if verb.switches.base else None
    version = verb.registry.resolve(verb.words[0])
    asked = Asked(Path(verb.words[1]), verb.cache_dir, base, verb.settings.trust_remote_code)
    done = publish(verb.registry, version, asked)
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
    verb = parse_verb("panda chat VERSION", text, argv, (MAX_NEW_TOKENS, TEMPERATURE, SYSTEM, BASE), TRUST)
    version = verb.registry.resolve(verb.words[0])
    from training.serving.chat import HELP
    from training.serving.chat import chat as talk
    from training.serving.deployed import Sampling

    deployed = _load(verb, version)
    print(f"{version.uri}: {HELP}", file=sys.stderr)
    sampling = Sampling(verb.switches.max_new_tokens, verb.switches.temperature)
    talk(deployed, _lines(), sampling, verb.switches.system, lambda words: print(words, end="", flush=True))
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
    text = "Serve a version to OpenAI clients at http://HOST:PORT/v1; for many of them at once, export it for vLLM."
    verb = parse_verb("panda serve VERSION", text, argv, (HOST, PORT, BASE), TRUST)
    version = verb.registry.resolve(verb.words[0])
    with bind(verb.switches.host, verb.switches.port) as bound:
        from training.serving.server import Names
        from training.serving.server import serve as answer

        deployed = _load(verb, version)
        print(_beginning(version, bound, deployed.prompt.template is None), file=sys.stderr, flush=True)
        answer(deployed, Names(tuple(names_of(version)), version.created_ms // 1000), bound)
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, before anything is loaded.

    :raises PandaError: the address is taken, or is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise PandaError(f"cannot listen on {host}:{port} ({error}); choose another with --host or --port") from error
    return bound


def names_of(version: Version) -> list[str]:
    """What clients call a version: the model's name, with its number, with its aliases."""
    aliases = (f"{version.name}@{alias}" for alias in sorted(version.aliases))
    return [version.name, f"{version.name}:{version.version}", *aliases]


def _beginning(version: Version, bound: socket.socket, has_no_template: bool) -> str:
    """What is said when the server is ready: address, names, and the command for more than a few users."""
    from training.serving.server import is_loopback

    host, port = bound.getsockname()[:2]
    names = names_of(version)
    directory = f"{version.name}-{version.version}"
    lines = [
        f"{version.uri} at http://{f'[{host}]' if ':' in host else host}:{port}/v1; clients name the model "
        f"{' or '.join(names)}",
        "this server is for trying a version and for few users; for load: "
        f"panda export {names[1]} {directory} && vllm serve {directory} --served-model-name {' '.join(names)} "
        f"--host {host} --port {port}",
    ]
    if has_no_template:
        lines.append("it has no chat template (a function of yours made its prompts): messages are joined line by line")
    if not is_loopback(bound):
        lines.append("everyone who reaches this address can use it: there is no password; put a proxy in front")
    return "\n".join(lines)


def _load(verb: Verb, version: Version) -> "Deployed":
    """The model of a version, in memory."""
    from training.serving.deployed import load

    base = Path(verb.switches.base) if verb.switches.base else None
    files = verb.registry.files(version, verb.cache_dir)
    return load(files, verb.cache_dir, base, verb.settings.trust_remote_code)


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
    verb = parse_verb(
        "panda benchmark VERSION", "Ask a version lm-eval's tasks; scores go to MLflow.", argv, SWITCHES, TRUST
    )
    given = verb.switches
    if not given.tasks:
        raise PandaError("name the tasks, for example --tasks hellaswag,arc_easy")
    version = verb.registry.resolve(verb.words[0])
    questions = Questions(
        [name.strip() for name in given.tasks.split(",")], given.task_dir, given.num_fewshot, given.limit,
        given.chat_template, given.batch_size, verb.settings.trust_remote_code,
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
