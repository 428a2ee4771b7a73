"""The page of a run: what is in it, what can never be, and that a run which ended anywhere has one."""

import json
import math
from html.parser import HTMLParser

import pytest

from data_prep.errors import CorpusError
from flows.report import charts, page
from flows.report.charts import Interval
from flows.report.facts import Facts, collect
from training.cost.words import duration

HOSTILE = '</td><script>alert("1")</script><img src=x onerror=alert(1)>'
SLICE = {"against": "champion", "slice": "all", "records": 40, "loss": 1.5, "perplexity": 4.5, "reference_loss": 1.6,
         "reference_perplexity": 5.0, "gain": 0.1, "low": 0.02, "high": 0.2, "chance": 0.01}  # fmt: skip
SAID = {"text": HOSTILE, "ends": False, "not_empty": True, "no_repetition": True, "exact": None}
GATE = {"promoted": True, "reasons": ["better"], "slices": [SLICE], "checks": [], "confidence": 0.98,
        "asked": [(HOSTILE, "yes")],
        "answers": {"candidate": [SAID], "champion": [{**SAID, "text": "old"}]}}  # fmt: skip
DATA = {"records_in": 12, "accepted": 9, "rejected": {"empty_target": 2}, "dropped": {"duplicate": 1}, "tokens": 900,
        "target_tokens": 500, "rows": 3, "utilisation": 0.95, "max_seq_length": 512, "validation_records": 2,
        "sources": {"instruction": {"records": 7, "epochs": 1.0, "tokens": 900, "share": 1.0}}}  # fmt: skip
MODEL = {"name": "panda", "version": 2, "uri": "models:/panda/2", "prompt": "?", "sample": "!"}
TRAINED = {"steps": 3, "seconds": 5.0, "first_loss": 3.0, "last_loss": 1.0}
ACCOUNT = {"wall_seconds": 100.0, "part_seconds": {"train": 60.0, "load": 20.0, "repeated": 15.0, "down": 5.0},
           "goodput": 0.6, "gpu_hours": 0.25, "price": 1.5, "currency": "EUR", "energy_kwh": 0.1}  # fmt: skip
LOSSES = {"before": {"all": 3.0}, "after": {"all": 1.5}}


class Tags(HTMLParser):
    """All start tags, with their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run-1"
    path.mkdir()
    (path / "config.yaml").write_text("model: panda-tiny\nmlflow_tracking_uri: postgresql://me:hunter2@db/x\n")
    (path / "gate.json").write_text(json.dumps(GATE))
    steps = [{"step": step, "loss": 4 - step, "target_tokens_per_second": 10.0} for step in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def whole(run_dir) -> str:
    trained = {**TRAINED, "stopped": "max_gpu_hours=2 ended training"}
    summary = {"data": DATA, "training": trained, "losses": LOSSES, "model": MODEL, "account": ACCOUNT}
    links = {"MLflow run": "[abc](http://127.0.0.1:5000/#/runs/abc)", "directory": f"`{run_dir}`"}
    return page.render(collect(run_dir, summary), links)


def test_the_story_is_told(run_dir):
    text = whole(run_dir)
    for part in ("9 of 12 records", "3.0000 → 1.5000", "champion", "panda reproduce models:/panda/2", "empty_target",
                 "max_gpu_hours=2 ended training", "training 1:00 (60%)", "lost to restarts 20.0 s (20%)",
                 "20.0 s, 15.0 s of it in steps that were made again, 5.0 s until the next start",
                 "60.0%", "1.50 EUR", "0.1 kWh",
                 "+0.0200 to +0.2000", 'class="better"',
                 '<a href="http://127.0.0.1:5000/#/runs/abc">abc</a>'):  # fmt: skip
        assert part in text, part
    assert "hunter2" not in text


def test_nothing_of_a_corpus_or_a_model_becomes_markup_and_nothing_comes_from_elsewhere(run_dir):
    tags = Tags(whole(run_dir)).found
    assert "script" not in {tag for tag, _ in tags}
    assert not [attributes for _, attributes in tags if any(name.startswith("on") for name in attributes)]
    assert {attributes.get("src", "") for tag, attributes in tags if tag in ("img", "link", "iframe")} <= {""}
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src "
                     "'unsafe-inline'; img-src data:"}) in tags  # fmt: skip


def test_a_run_that_has_done_nothing_has_a_page(tmp_path):
    text = page.render(Facts(tmp_path, {}), {}, "the corpus is gone")
    assert "ended early" in text and "the corpus is gone" in text and "--resume" in text


@pytest.mark.parametrize("error", [CorpusError("no target"), RuntimeError("broken"), KeyboardInterrupt()])
def test_it_is_written_however_the_run_ends(run_dir, error):
    with pytest.raises(type(error)), page.written(run_dir, {"data": DATA}, {}):
        raise error
    text = (run_dir / "report.html").read_text()
    assert "9 of 12 records" in text and (str(error) or "KeyboardInterrupt") in text


def test_a_page_that_cannot_be_written_costs_nothing(run_dir, monkeypatch, caplog):
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    with page.written(run_dir, {}, {}):
        pass
    assert "going on without report.html" in caplog.text and not (run_dir / "report.html").exists()


class TestCharts:
    def test_a_spike_is_not_thinned_away(self):
        points = [(float(step), 99.0 if step == 4321 else 1.0) for step in range(10_000)]
        drawn = charts.lines("loss", {"training": points})
        assert len(drawn) < 30_000 and f",{charts.TOP:.1f}" in drawn

    def test_what_is_no_number_is_left_out(self):
        assert charts.lines("loss", {"a": [(1, math.nan)], "b": []}) == ""
        assert "nan" not in charts.lines("loss", {"a": [(1, math.nan), (2, 5.0)]})

    def test_an_interval_on_both_sides_of_nothing_is_open(self):
        drawn = charts.intervals("gain", [Interval("a", 0.1, -0.1, 0.3), Interval("b", -0.2, -0.3, -0.1),
                                          Interval("c", 0.0, None, None)])  # fmt: skip
        assert [kind for kind in ("better", "open", "worse") if f'line class="{kind}"' in drawn] == ["open", "worse"]

    def test_shares_name_all_parts(self):
        assert "train 3.0 s (75%)" in charts.shares("time", {"train": 3.0, "gate": 1.0}, duration)
        assert charts.shares("time", {}, duration) == ""

    def test_an_empty_part_is_not_shown_and_changes_no_colour(self):
        drawn = charts.shares("time", {"train": 3.0, "load": 0.0, "gate": 1.0}, duration)
        assert "load" not in drawn and 'class="key c2">gate' in drawn
