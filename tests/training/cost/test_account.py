"""The account of time: parts that add up, whatever happened; hours, energy and price of literal lines."""

import json
import os

import pytest
from pydantic import ValidationError

from training import run_files
from training.cost import marks
from training.cost.account import account_of, energy_kwh, forecast, settle, spans
from training.cost.marks import (
    DOWN,
    EVALUATE,
    LOAD,
    PREPARE,
    REPEATED,
    SAVE,
    TRAIN,
    WAITING,
    WARM_UP,
    Mark,
    end_what_was_killed,
)
from training.cost.words import duration, in_a_line, in_words, parts, totals
from training.settings import CostSettings

FREE = CostSettings()
PRICED = CostSettings(price_per_gpu_hour=3600.0, currency="EUR")  # one a second
KILLED = [
    Mark(time=0, part=WAITING), Mark(time=1, part=PREPARE), Mark(time=3, part=LOAD), Mark(time=3, devices=2, gpus=True),
    Mark(time=10, part=EVALUATE, step=0), Mark(time=11, part=WARM_UP, step=0), Mark(time=13, part=TRAIN, step=1),
    Mark(time=20, part=SAVE, step=5), Mark(time=21, part=TRAIN, step=5),
    Mark(time=30, part=EVALUATE, step=10), Mark(time=31, part=TRAIN, step=10),
    Mark(time=40, part=DOWN, devices=0),
    Mark(time=60, part=PREPARE), Mark(time=61, part=LOAD), Mark(time=61, devices=2), Mark(time=68, resumed_from=5),
    Mark(time=70, part=WARM_UP, step=5), Mark(time=72, part=TRAIN, step=6), Mark(time=90, part=SAVE, step=20),
    Mark(time=95, devices=0), Mark(time=95, part=WAITING),
]  # fmt: skip
"""Killed at 40 after the checkpoint of step 5, started again at 60."""
BY_PART = {
    WAITING: 1 + 5, PREPARE: 2 + 1, LOAD: 7 + 9, EVALUATE: 1, WARM_UP: 2 + 2, TRAIN: 7 + 18, SAVE: 1 + 5, DOWN: 20,
    REPEATED: 9 + 1 + 9,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def write(run_dir, lines, name=run_files.TIME):
    (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_part(found):
    return {part: sum(span.seconds for span in found if span.part == part) for part in {span.part for span in found}}


def test_every_second_is_of_one_part_and_what_a_death_has_cost_is_named():
    found = spans(KILLED, until=100)
    assert by_part(found) == BY_PART
    assert sum(BY_PART.values()) == 100
    assert sum(span.seconds * span.devices for span in found) == 2 * (40 - 3) + 2 * (95 - 61)


def test_lines_of_several_processes_need_not_be_in_order(run_dir):
    write(run_dir, KILLED[::-1][:5] + KILLED[:-5])
    assert by_part(spans(marks.read(run_dir), until=100)) == BY_PART


@pytest.mark.parametrize(
    ("resumed_from", "lost"), [(10, 9), (5, 9 + 1 + 9), (0, 1 + 2 + 7 + 1 + 9 + 1 + 9)], ids=["10", "5", "nothing"]
)
def test_all_after_the_checkpoint_is_lost_its_own_evaluation_is_not(resumed_from, lost):
    lines = [{**one, "resumed_from": resumed_from} if "resumed_from" in one else one for one in KILLED]
    assert by_part(spans(lines, until=100))[REPEATED] == lost


def test_an_empty_run_has_an_account(run_dir):
    account = account_of(run_dir, PRICED)
    assert account["wall_seconds"] == account["goodput"] == account["price"] == 0
    assert in_words(account)


class TestDeath:
    def test_the_missing_line_is_at_the_last_sign_of_life(self, run_dir):
        write(run_dir, [Mark(time=100, part=TRAIN, step=1, devices=2)])
        write(run_dir, [], run_files.METRICS)
        os.utime(run_dir / run_files.METRICS, (150, 150))
        os.utime(run_dir / run_files.TIME, (120, 120))
        end_what_was_killed(run_dir, before=200, is_restart=False)
        assert marks.read(run_dir)[-1] == {"time": 150, "part": DOWN, "devices": 0}

    def test_what_lived_longer_than_the_next_process_waited(self, run_dir):
        write(run_dir, [Mark(time=100, part=TRAIN)])
        end_what_was_killed(run_dir, before=130, is_restart=False)
        assert marks.read(run_dir)[-1]["time"] == 130

    @pytest.mark.parametrize("is_restart", [True, False])
    def test_after_an_orderly_end_only_a_restart_has_lost_time(self, run_dir, is_restart):
        write(run_dir, [Mark(time=100, part=TRAIN), Mark(time=110, part=WAITING, devices=0)])
        end_what_was_killed(run_dir, before=130, is_restart=is_restart)
        assert (marks.read(run_dir)[-1]["part"] == DOWN) is is_restart

    def test_half_a_line_is_none(self, run_dir):
        (run_dir / run_files.TIME).write_text('{"time": 1, "part": "train"}\n{"time": 2, "pa')
        assert marks.read(run_dir) == [{"time": 1, "part": "train"}]

    def test_a_disk_that_takes_nothing_costs_the_account_alone(self, tmp_path, caplog):
        marks.turn_to(tmp_path / "missing", TRAIN)
        assert "time.jsonl: not written" in caplog.text


class TestNumbers:
    def test_goodput_is_of_the_time_that_was_not_waited(self, run_dir):
        write(run_dir, [*KILLED[:-1], {**KILLED[-1], "time": 95}])
        account = account_of(run_dir, FREE)  # it has waited ever since
        assert account["goodput"] == pytest.approx(25 / 94)
        assert account["gpu_hours"] == pytest.approx(142 / 3600)
        assert not {"rank_hours", "price", "currency", "energy_kwh", "forecast_seconds"} & account.keys()

    def test_hours_of_cpus_are_not_called_gpu_hours_and_a_price_has_its_currency(self, run_dir):
        write(run_dir, [{name: value for name, value in one.items() if name != "gpus"} for one in KILLED])
        account = account_of(run_dir, PRICED)
        assert account["rank_hours"] == pytest.approx(142 / 3600) and "gpu_hours" not in account
        assert (account["price"], account["currency"]) == (pytest.approx(142), "EUR")
        assert ("price", "142.00 EUR") in in_words(account)
        assert in_a_line(60, account).endswith("rank-hours (CPU), price 142.00 EUR")

    @pytest.mark.parametrize(("num_sampled", "kwh"), [(2, 2 * 360 * 10 * 3 / 3.6e6), (1, None), (8, None), (0, None)])
    def test_energy_is_that_of_the_gpus_that_were_held_or_none(self, num_sampled, kwh):
        """At 10, 20, 30, 40 and, after an hour without a sample, 3640; from 35 on nothing is held."""
        held = spans([Mark(time=0, part=TRAIN, devices=2), Mark(time=35, devices=0), Mark(time=3635, devices=2)], 4000)
        power = {f"system/gpu_{number}_power_usage_watts": 360.0 for number in range(num_sampled)}
        samples = [{"time": time, "system/cpu": 1.0, **power} for time in (0, 10, 20, 30, 40, 3640)]
        assert energy_kwh(samples, held) == (kwh and pytest.approx(kwh))

    def test_the_forecast_of_the_first_steps_beside_what_they_took(self, run_dir):
        write(run_dir, [Mark(time=0, part=TRAIN, devices=4, gpus=True)])
        write(run_dir, [{"seconds": value} for value in (9.0, 1.0, 1.0, 2.0, 1.0, 1.0)], run_files.METRICS)
        assert forecast(run_dir, 900, PRICED) == (900, {"gpu_hours": 1.0, "price": 3600.0, "currency": "EUR"})
        account = account_of(run_dir, FREE)
        assert (account["forecast_seconds"], account["steps_seconds"]) == (6.0, 15.0)
        assert dict(totals(account))["steps"] == "15.0 s; the first ones foretold 6.0 s (+150.0%)"

    def test_too_few_steps_foretell_nothing(self, run_dir):
        write(run_dir, [{"seconds": 1.0}] * 5, run_files.METRICS)
        write(run_dir, KILLED)
        assert forecast(run_dir, 10, FREE) is None and "forecast_seconds" not in account_of(run_dir, FREE)

    def test_each_end_is_a_line(self, run_dir):
        write(run_dir, KILLED)
        first, second = settle(run_dir, FREE), settle(run_dir, FREE)
        lines = run_files.read_lines(run_dir / run_files.ACCOUNT)
        assert [line["wall_seconds"] for line in lines] == [first["wall_seconds"], second["wall_seconds"]]

    def test_parts_for_people_are_all_of_it(self, run_dir):
        write(run_dir, KILLED)
        account = account_of(run_dir, FREE)
        assert sum(parts(account).values()) == pytest.approx(account["wall_seconds"])
        assert parts(account)["lost to restarts"] == BY_PART[DOWN] + BY_PART[REPEATED]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (59.97, "1:00"), (75, "1:15"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "bad",
    [
        {"max_gpu_hours": 0}, {"max_gpu_hours": -1}, {"max_gpu_hours": float("nan")}, {"max_gpu_hours": float("inf")},
        {"price_per_gpu_hour": -0.01}, {"price_per_gpu_hour": float("inf")}, {"currency": "usd"}, {"currency": "$"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        CostSettings(**bad)
