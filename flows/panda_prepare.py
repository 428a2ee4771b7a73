"""The flow `panda-prepare`: the data stages of `panda-train` on their own, for machines without GPU.

In: the settings of the data as parameters. Out: the data report. What it makes lies in `cache_dir`, where `panda-train`
finds it. No `from __future__ import annotations` here: `flow.serve` fails on it.
"""

from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from configs.settings import RunSettings
from data_prep import in_use
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from flows.parts import flow_states
from flows.parts.flow_states import EarlyExit
from flows.parts.form import configure, flow_of_settings, run_title
from flows.parts.lifetime import begin
from flows.parts.notify import on_bad_end
from flows.parts.run_dir import Summary
from flows.parts.stages import prepare_data
from tasks.account import Stopwatch

INTRODUCTION = "Corpora in, packed training rows out: validate and shard, tokenize, plan packing."
SETTINGS = {
    *CorpusSettings.model_fields,
    *TokenizeSettings.model_fields,
    *PackSettings.model_fields,
    *RunSettings.model_fields,
    *("model", "ckpt_path", "delta_base", "architecture", "notify"),
} - {"resume", "run_name", "preset"}


def panda_prepare(**parameters: Any) -> State[Any]:
    """Replaced below: the form and the reference are made from the settings classes."""
    begin()
    watch = Stopwatch()
    try:
        settings = configure(parameters).settings
        with in_use.using(Path(settings.cache_dir)):
            prepared = prepare_data(settings, watch)
    except EarlyExit as early:
        return flow_states.completed(early.summary)
    except flow_states.ERRORS as error:
        return flow_states.ended_by(error)
    report = prepared.plan.report
    message = f"{report['rows']:,} rows, {report['target_tokens']:,} target tokens in {prepared.plan.path}"
    summary: Summary = {"data": report, "seconds": watch.seconds}
    return flow_states.completed(flow_states.with_outcome(summary, "Prepared", message))


panda_prepare = flow_of_settings(
    panda_prepare,
    INTRODUCTION,
    SETTINGS,
    name="panda-prepare",
    flow_run_name=run_title,
    persist_result=False,
    on_failure=[on_bad_end],
    on_crashed=[on_bad_end],
    on_cancellation=[on_bad_end],
)
