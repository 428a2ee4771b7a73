"""What a person is asked about a version that has passed the gate, or a corpus that has changed, and the answer.

In: the result of the gate, losses, addresses. Out: Markdown that mail and chats can show as it is; `Approval`, as
RUN/approval.json or RUN/corpus-approval.json. The file is written before the question is asked and again with the
answer, so that a run that was killed in between finds the answer it was given, and nobody who has answered is asked
again about the same comparison. Cost: none.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from training import run_files
from training.comparison.intervals import CONFIDENCE
from training.comparison.job import Answered, GateResult
from training.comparison.statistics import SliceRow, interval_of
from training.tracking.redact import redact_text

WAITING, APPROVED, REFUSED, NO_ANSWER = "waiting", "approved", "refused", "no answer"


@dataclass(frozen=True)
class Approval:
    """A question and its answer; it holds for this version (or corpus) as compared with this champion."""

    version: str
    champion: str | None
    flow_run_id: str
    key: str  # of the pause in that flow run
    answer: str = WAITING
    comment: str = ""

    @property
    def as_verdict(self) -> Answered:
        """What the verdict says about it."""
        return {"answer": self.answer, "comment": self.comment}


def read(path: Path, version: str, champion: str | None) -> Approval | None:
    """The question that this comparison has led to, if it was asked."""
    if not path.exists():
        return None
    asked = run_files.read_as(path, Approval)
    return asked if (asked.version, asked.champion) == (version, champion) else None


def write(path: Path, approval: Approval) -> None:
    """Write RUN/approval.json, or that of the corpus."""
    run_files.write_json(path, asdict(approval))


def in_words(answer: Answered) -> str:
    """`refused: not today`; one line."""
    comment = " ".join(answer["comment"].split())
    return f"{answer['answer']}: {comment}" if comment else answer["answer"]


def question(result: GateResult, losses: dict[str, dict[str, float]], addresses: dict[str, str]) -> str:
    """All that is needed to decide."""
    decisive = "champion" if result.get("champion") else "base"
    rows = [row for row in result["slices"] if row["against"] == decisive]
    lines = [*result["reasons"], *_compared(rows, decisive), *_trained(losses)]
    lines += [f"{what}: {_shown(address)}" for what, address in addresses.items()]
    return f"Make {result['candidate']} the champion?\n\n" + "\n".join(f"- {line}" for line in lines)


def _compared(rows: list[SliceRow], decisive: str) -> list[str]:
    """Gain with its interval, both losses, and the slice that fares worst."""
    whole = next((row for row in rows if row["slice"] == "all"), None)
    if whole is None:
        return []
    gain = f"gain: {interval_of(whole)} nats per target token ({CONFIDENCE:.0%}, {whole['records']} held-out records)"
    both = f"loss on them: {whole['loss']:.4f}, {decisive} {whole['reference_loss']:.4f}"
    slices = [row for row in rows if row["slice"] != "all"]
    worst = min([row for row in slices if row["low"] is not None] or slices, key=lambda row: row["gain"], default=None)
    if worst is None:
        return [gain, both]
    return [gain, both, f"worst slice: {worst['slice']}, gain {interval_of(worst)} on {worst['records']} records"]


def _trained(losses: dict[str, dict[str, float]]) -> list[str]:
    before, after = losses["before"], losses["after"]
    sources = [f"{source} {before[source]:.4f} -> {after[source]:.4f}" for source in after if source in before]
    return [f"held-out loss before and after training: {', '.join(sources)}"] if sources else []


def _shown(address: str) -> str:
    """A link in Markdown, mail and chats; what is no address stands as it is."""
    return f"<{address}>" if address.startswith(("http://", "https://")) else f"`{redact_text(address)}`"
