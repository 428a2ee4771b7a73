"""RUN/report.html: data -> loss -> gate on one screen, and below it what each of them is made of.

In: the run directory, the summary as far as the run has come, links by name. Out: one file without a script and
without anything from elsewhere, that can be sent to somebody. Cost: that of `facts`, and 50 ms.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_prep.errors import PandaError
from data_prep.inspection.render import as_html
from data_prep.store import write_atomically
from flows.parts.flow_states import EarlyExit
from flows.parts.run_dir import Summary
from flows.report import charts
from flows.report.charts import Interval
from flows.report.facts import Facts, collect
from training import run_files
from training.comparison.job import Answer, GateResult
from training.cost.words import duration, parts, totals
from training.tracking.looks import only_a_look
from training.tracking.plots import data_uri

MAX_ANSWERS = 8
LINK = re.compile(r"\[([^\]]*)\]\((https?://[^)]*)\)")
ROLES = ("base", "champion", "candidate")
MADE_OF = ("model", "ckpt_path", "use_lora", "use_quant", "strategy", "zero_stage", "learning_rate", "max_seq_length",
           "num_train_epochs", "max_steps", "seed")  # fmt: skip


@contextlib.contextmanager
def written(run_dir: Path, summary: Summary, links: dict[str, str]) -> Iterator[None]:
    """Write the page at the end of the block, however it ends; `summary` and `links` are filled in the block."""
    ended = ""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, PandaError | EarlyExit)
        ended = str(error) if known else f"{type(error).__name__}: {error}"
        raise
    finally:
        with only_a_look(f"{run_files.PAGE} of {run_dir.name}"):
            write(run_dir, summary, links, ended)


def write(run_dir: Path, summary: Summary, links: dict[str, str], ended: str = "") -> Path:
    """The page of a run as it stands now; `ended`: what ended it early."""
    path = run_dir / run_files.PAGE
    write_atomically(path, render(collect(run_dir, summary), links, ended), 0o600)
    return path


def render(facts: Facts, links: dict[str, str], ended: str = "") -> str:
    """HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
    account = facts.summary.get("account")
    return environment.get_template("page.html.j2").render(
        facts=facts,
        summary=facts.summary,
        data=facts.summary.get("data"),
        gate=facts.gate,
        ended=ended,
        links={name: _target(link) for name, link in links.items()},
        loss_chart=charts.lines("Loss per target token", {"training": facts.loss, "held out": facts.held_out}),
        speed_chart=charts.lines("Target tokens per second,", {"last": facts.speed}, from_zero=True),
        mfu_chart=charts.lines("Model FLOPs utilisation,", {"last": facts.utilisation}, from_zero=True),
        gain_chart=charts.intervals("Gain in nats per target token, right of the line is better", gains(facts.gate)),
        time_chart=charts.shares("Where the time went:", parts(account), duration) if account else Markup(),
        cost=totals(account) if account else [],
        answers=answers(facts.gate),
        roles=[role for role in ROLES if facts.gate and role in facts.gate.get("answers", {})],
        examples=[Markup(as_html(one)) for one in facts.data.examples] if facts.data else [],
        alarm=facts.summary.get("corpus_alarm"),
        alarm_picture=data_uri(plot) if (plot := facts.run_dir / run_files.CORPUS_PLOT).exists() else "",
        made_of={name: facts.config[name] for name in MADE_OF if facts.config.get(name) is not None},
    )


def gains(gate: GateResult | None) -> list[Interval]:
    """What was decided by: losses per slice against each model."""
    rows = gate["slices"] if gate else []
    return [Interval(f"{row['slice']}, {row['against']}", row["gain"], row["low"], row["high"]) for row in rows]


def answers(gate: GateResult | None) -> list[dict[str, Any]]:
    """Prompt, right answer, and what each model has written."""
    said: dict[str, list[Answer]] = gate.get("answers", {}) if gate else {}
    asked = gate.get("asked", []) if gate else []
    shown = max((len(one) for one in said.values()), default=0)
    return [
        {
            "prompt": asked[number][0] if number < len(asked) else "",
            "right": asked[number][1] if number < len(asked) else "",
            **{role: said[role][number] for role in said if number < len(said[role])},
        }
        for number in range(min(shown, MAX_ANSWERS))
    ]


def _target(link: str) -> tuple[str, str]:
    """(Text, address or nothing) of a link in Markdown."""
    found = LINK.fullmatch(link)
    return (found[1], found[2]) if found else (link.strip("`"), "")
