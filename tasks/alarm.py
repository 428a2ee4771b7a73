"""Task of the corpus alarm: this week's corpus beside the champion's, before anything is trained on it.

In: the run directory, the plan, the champion and its registry. Out: `CorpusAlarm`, also RUN/report/corpus_alarm.json
with a picture; RUN/report/corpus_profile.arrow goes to MLflow with the run, and is what the next corpus is compared
with once this version is the champion. A champion of earlier code has none: its plan is looked at, where it is on this
machine. A run that goes on finds what it has found before. Cost: below half a second, two requests to MLflow.
"""

from dataclasses import asdict
from pathlib import Path

from data_prep.errors import PandaError
from data_prep.inspection import drift
from data_prep.inspection.drift import Finding
from data_prep.inspection.profile import Profile, load, new_records, places, save, take_profile
from tasks.reporting import alarm_in_words, show_corpus_alarm
from tasks.stage import stage
from training import run_files
from training.registry.lineage import config_of, plan_of
from training.registry.versions import Registry, Version
from training.run_files import CorpusAlarm, Moved
from training.tracking.looks import only_a_look
from training.tracking.plots import write_bars


@stage("corpus alarm", says=alarm_in_words)
def look_at_corpus(run_dir: Path, plan_dir: Path, registry: Registry, champion: Version | None) -> CorpusAlarm:
    """Compare, write down, show."""
    path = run_dir / run_files.CORPUS_ALARM
    if path.exists():
        return run_files.read_json(path)
    path.parent.mkdir(exist_ok=True)
    now = take_profile(plan_dir)
    save(now, run_dir / run_files.CORPUS_PROFILE)
    alarm, picture = _compared(run_dir, plan_dir, now, registry, champion)
    run_files.write_json(path, alarm)
    show_corpus_alarm(alarm, picture)
    return alarm


def _compared(
    run_dir: Path, plan_dir: Path, now: Profile, registry: Registry, champion: Version | None
) -> tuple[CorpusAlarm, Path | None]:
    """What is found, and a picture of it where there is something to see."""
    if champion is None:
        return not_compared("no champion yet, so there is no corpus to compare with"), None
    try:
        before = profile_of(registry, champion, plan_dir.parent.parent)
    except PandaError as error:
        return not_compared(f"{champion.uri}: {error}"), None
    if before is None:
        return not_compared(f"{champion.uri} has no profile of its corpus, and its plan is not on this machine"), None
    findings = drift.compare(before, now, new_records(plan_dir, before))
    alarm = CorpusAlarm(compared_with=champion.uri, note="", findings=[_moved(one, plan_dir) for one in findings])
    picture = None
    if findings:
        with only_a_look("the picture of the corpus alarm"):
            panels = [(f"{one.measure}: {one.slice}", one.bars) for one in findings]
            picture = write_bars(run_dir / run_files.CORPUS_PLOT, panels)
    return alarm, picture


def profile_of(registry: Registry, version: Version, cache_dir: Path) -> Profile | None:
    """Of the corpus a version was trained on, if there is one or can be one.

    :raises PandaError: it is damaged.
    """
    content = registry.file(version, run_files.CORPUS_PROFILE)
    if content is not None:
        return load(content)
    plan_dir = plan_of(version, config_of(registry, version), cache_dir)
    return take_profile(plan_dir) if plan_dir else None


def not_compared(note: str) -> CorpusAlarm:
    """Nothing was compared, and why."""
    return CorpusAlarm(compared_with=None, note=note, findings=[])


def _moved(finding: Finding, plan_dir: Path) -> Moved:
    facts = asdict(finding)
    facts.pop("bars")
    return Moved(**{**facts, "lines": places(plan_dir, facts.pop("rows"))})  # type: ignore[typeddict-item]  # the same names
