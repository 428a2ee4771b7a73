"""The story of a run on one page: what became of the data, what it did to the loss, what the gate says, where to look.

In: the summary, and links by name. Out: Markdown, as the artifact `overview` in Prefect and as the description of the
run and of the version in MLflow. A run that ends early tells as much as it has done. Cost: 40 ms and two requests.
"""

import logging
from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact

from data_prep.plan.report import DataReport
from flows.parts.run_dir import Summary
from tasks.reporting import alarm_markdown, spikes_markdown
from training.comparison.job import GateResult
from training.comparison.report import comparison_markdown
from training.cost.words import in_words
from training.registry.versions import Registry
from training.run_files import Losses, Trained
from training.tracking.run import TrackedRun

logger = logging.getLogger(__name__)


def show(summary: Summary, links: dict[str, str] | None = None) -> None:
    """The artifact `overview`; one that cannot be made is a warning: the model is there."""
    try:
        text = _whole(summary, links)
        create_markdown_artifact(text, key="overview", description="What went in, what came out, and how good it is")
    except Exception:
        logger.warning("no overview of the run in Prefect", exc_info=True)


def tell_mlflow(tracked: TrackedRun, summary: Summary, links: dict[str, str]) -> None:
    """The same as the description of the run and of the version; one that cannot be written is a warning."""
    tracked.describe(story(summary, links))
    try:
        registry = Registry(tracked.uri)
        registry.describe(registry.resolve(summary["model"]["uri"]), _whole(summary, links))
    except Exception:
        logger.warning("no description of %s in MLflow", summary["model"]["uri"], exc_info=True)


def _whole(summary: Summary, links: dict[str, str] | None) -> str:
    """The story, and the tables of the comparison where there was one."""
    tables = comparison_markdown(summary["gate"]) if "gate" in summary else ""
    return story(summary, links) + (f"\n\n## Comparison\n\n{tables}" if tables else "")


def story(summary: Summary, links: dict[str, str] | None = None) -> str:
    """Markdown: outcome, data -> loss -> gate, links."""
    sections = [_outcome(summary)]
    if "data" in summary:
        sections.append(f"## Data\n\n{_table(('what', 'number'), _data(summary['data']))}")
    if summary.get("corpus_alarm", {}).get("findings"):
        sections.append(f"## Corpus alarm\n\n{alarm_markdown(summary['corpus_alarm'])}")
    if "training" in summary:
        sections.append(f"## Training\n\n{_table(('what', 'number'), _training(summary['training']))}")
    if "account" in summary:
        sections.append(f"## Time and cost\n\n{_table(('what', 'how much'), in_words(summary['account']))}")
    spikes, others = summary.get("spikes", []), summary.get("standing_out", [])
    if spikes or others:
        sections.append(f"## Spikes\n\n{spikes_markdown(spikes, others)}")
    if "losses" in summary:
        sections.append(f"## Held-out loss per target token\n\n{_losses(summary['losses'])}")
    if "gate" in summary:
        sections.append(f"## Gate\n\n{_gate(summary['gate'])}")
    if links:
        sections.append(f"## Links\n\n{_table(('what', 'where'), list(links.items()))}")
    return "\n\n".join(section for section in sections if section)


def _outcome(summary: Summary) -> str:
    """What the run has come to, in a line."""
    if "model" in summary:
        model = summary["model"]
        verdict = f", {verdict_of(summary)}" if "gate" in summary else ""
        return f"**{model['name']} version {model['version']}{verdict}**"
    if "outcome" in summary:
        return f"**{summary['outcome']['name']}**: {summary['outcome']['message']}"
    return ""


def verdict_of(summary: Summary) -> str:
    """What the gate has made of the version."""
    return "champion" if summary["gate"]["promoted"] else "challenger"


def _data(report: DataReport) -> list[tuple[str, str]]:
    """Records in = accepted + rejected + dropped; tokens of the training rows."""
    rows = [
        ("records in", f"{report['records_in']:,}"),
        ("accepted", f"{report['accepted']:,}, {report['validation_records']:,} of them held out"),
        ("rejected", _by_reason(report["rejected"])),
        ("dropped", _by_reason(report["dropped"])),
        *([("fields that nothing is made of", _by_name(unread))] if (unread := report.get("unread_fields")) else []),
        ("tokens", f"{report['tokens']:,}, {report['target_tokens']:,} of them targets"),
        ("rows", f"{report['rows']:,} of {report['max_seq_length']:,} tokens, {report['utilisation']:.1%} full"),
    ]
    sources = report.get("sources", {}).items()
    return [
        *rows,
        *((f"source {name}", f"{s['records']:,} records, {s['share']:.1%} of the tokens") for name, s in sources),
    ]


def _by_name(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _by_reason(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,}" + (f" ({reasons})" if reasons else "")


def _training(trained: Trained) -> list[tuple[str, str]]:
    rows = [("steps", f"{trained['steps']:,}"), ("target tokens", f"{trained['target_tokens']:,}")]
    if trained["first_loss"] is not None:
        rows.append(("loss", f"{trained['first_loss']:.4f} → {trained['last_loss']:.4f}"))
    if stopped := trained.get("stopped"):
        rows.append(("ended early", stopped))
    return [*rows, ("duration", f"{trained['seconds']:,.0f} s")]


def _losses(losses: Losses) -> str:
    """A row per source, all of them together last; nothing held out is said plainly."""
    before, after = losses["before"], losses["after"]
    rows = [(name, _loss(before.get(name)), _loss(after.get(name))) for name in dict.fromkeys([*before, *after])]
    return _table(("source", "before", "after"), rows) if rows else "Nothing is held out, so nothing was measured."


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _gate(gate: GateResult) -> str:
    reasons = "\n".join(f"- {reason}" for reason in gate["reasons"])
    return f"{'It is the champion now' if gate['promoted'] else 'It stays challenger'}:\n\n{reasons}"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
