"""Command lines: `python train.py` and the console command `panda VERB`.

In: argv. Out: an exit code (0 done, 2 the user's to mend, 1 anything else, 130 interrupted); results on stdout, logs
and progress on stderr. Everything heavy is imported by the verb that needs it, so `--help` and errors answer at once.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from configs.cli import (
    CONF_PATH,
    DRY_RUN,
    JSON,
    PLAN_SWITCHES,
    PRINT_CONFIG,
    VERBOSE,
    configure,
)
from data_prep.errors import PandaError, disk_errors

if TYPE_CHECKING:
    from rich.console import Console

TRAIN_TEXT = "Turn JSON corpora and a base model into a registered, evaluated model: one Prefect flow, in this process."
TRAIN_SWITCHES = [CONF_PATH, PRINT_CONFIG, DRY_RUN, JSON, VERBOSE, *PLAN_SWITCHES]
HELP = ("-h", "--help")
STANDING = "cli.standing:show"  # `panda` alone
STATES_OF_PREFECT = ("Task run failed with state", "Finished in state")

VERBS: dict[str, tuple[str, str]] = {
    "up": ("stack.up:up", "start Prefect server, MLflow server and worker in the background"),
    "down": ("stack.up:down", "stop them"),
    "status": ("stack.up:status", "show what of it runs"),
    "schedule": ("cli.schedule:main", "show or change when deployments run, and with which settings"),
    "serve-flow": ("stack.serve:serve_flow", "serve the deployments in this terminal, without a worker"),
    "plan": ("cli.plan:main", "tell what a run would do, need and take, without training"),
    "prepare": ("cli.data:prepare", "prepare the data without training, and report what became of every record"),
    "inspect": ("cli.data:inspect", "show prepared examples with their mask, lengths and packing"),
    "why": ("cli.data:why", "tell the story of one input record"),
    "models": ("cli.registry:models", "show registered versions, their gates and aliases"),
    "promote": ("cli.registry:promote", "make a version the champion"),
    "rollback": ("cli.registry:rollback", "give the champion alias back to the version before"),
    "lineage": ("cli.registry:lineage", "show what a version was made of"),
    "export": ("cli.use:export", "write a version as a plain model directory, adapter merged"),
    "chat": ("cli.use:chat", "talk to a version in the terminal"),
    "serve": ("cli.use:serve", "serve a version to OpenAI clients"),
    "benchmark": ("cli.use:benchmark", "ask a version tasks of lm-eval, scores to MLflow"),
    "reproduce": ("cli.reproduce:main", "train the first steps of a version again; the losses must agree"),
    "takedown": ("cli.registry:takedown", "take a record down, and tag the versions that saw it"),
    "gc": ("retention.verb:main", "show or free what no version and no run needs any more"),
    "completion": ("cli.main:completion", 'print a shell completion script: eval "$(panda completion)"'),
    "verify": ("cli.data:verify", "read all prepared data again and compare hashes"),
}
"""Verb -> (`module:function` below `flows`, called with argv, returns the exit code; one line of help)."""


def train_main(argv: list[str]) -> int:
    """`python train.py`."""
    return guarded(lambda: _train(argv), verbose="--verbose" in argv)


def main(argv: list[str] | None = None) -> int:
    """`panda VERB ...`; without a verb, where things stand."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        from importlib.metadata import version

        print(f"panda-train {version('panda-train')}")
        return 0
    flags_alone = not argv or (argv[0].startswith("-") and argv[0] not in HELP)
    if not flags_alone and argv[0] not in VERBS:
        return _overview(argv)
    place, words = (STANDING, argv) if flags_alone else (VERBS[argv[0]][0], argv[1:])
    module, _, function = place.partition(":")

    def run() -> int:
        return getattr(importlib.import_module(f"flows.{module}"), function)(words)

    return guarded(run, verbose="--verbose" in argv)


def guarded(command: Callable[[], int], verbose: bool) -> int:
    """Run a command; an error the user can mend is shown as its message alone."""
    _log_to_stderr(verbose)
    try:
        with disk_errors():
            return command()
    except PandaError as error:
        if verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _log_to_stderr(verbose: bool) -> None:
    """Our own progress for people; of other libraries only warnings."""
    handler = OnTerminal() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_for_people)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for package in ("data_prep", "training", "configs", "tasks", "flows"):
        logging.getLogger(package).setLevel(logging.DEBUG if verbose else logging.INFO)


class OnTerminal(logging.Handler):
    """Prints through a console, which knows the line that a stage draws below the logs; rich is imported by then."""

    @cached_property
    def console(self) -> "Console":
        from flows.cli.console import stderr_console

        return stderr_console()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(self.format(record))
        except Exception:
            self.handleError(record)


def _is_for_people(record: logging.LogRecord) -> bool:
    """Prefect's own lines say in other words what the stages say, and its states what the last line says."""
    if not record.name.startswith("prefect"):
        return True
    return record.levelno > logging.INFO and not record.getMessage().startswith(STATES_OF_PREFECT)


def _train(argv: list[str]) -> int:
    line, loaded = configure("train.py", TRAIN_TEXT, argv, TRAIN_SWITCHES)
    if not line.switches.conf_path:
        from flows.parts.run_dir import as_in_the_run

        loaded = as_in_the_run(loaded, line.values, line.overrides)
    if line.switches.print_config:
        from configs.docs import with_origins

        print(with_origins(loaded))
        return 0
    if line.switches.dry_run:
        from flows.cli import plan

        return plan.run(line, loaded)
    from flows.cli.run import run

    return run(line, loaded)


def _overview(argv: list[str]) -> int:
    """The list of verbs; a misspelt one is an error."""
    from configs.errors import did_you_mean

    known = argv[0] in HELP
    stream = sys.stdout if known else sys.stderr
    if not known:
        print(f"error: unknown command {argv[0]!r}{did_you_mean(argv[0], VERBS)}", file=stream)
    print("usage: panda VERB [--flag value ...]   (panda VERB --help shows the flags)\n", file=stream)
    print(f"  {'':<12} without a verb: where things stand; --version", file=stream)
    for verb, (_, text) in VERBS.items():
        print(f"  {verb:<12} {text}", file=stream)
    return 0 if known else 2


def completion(argv: list[str]) -> int:
    """Print the script for bash and zsh."""
    from configs.docs import completion_script

    print(completion_script(list(VERBS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
