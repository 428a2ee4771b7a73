"""Spikes are found, their records named, and what `on_spike` says is done: under every engine, on 1, 2 and 4 ranks.

The rows of one step are garbage. Ranks are real; the runs of a number of ranks share their processes.
"""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan.order import rows_of_step
from tests.support import tiny
from tests.support.plans import example, write_plan
from tests.training.engines.test_modes import LORA
from tests.training.models.test_loss import literal_batch
from training.models.loss import micro_batch
from training.trainer.spikes import (
    LEAST,
    LEAST_SEGMENTS,
    LEVEL,
    NO_LIMITS,
    NUM_BINS,
    WINDOW,
    Limits,
    SegmentLosses,
    Usual,
    limits_after,
    losses_of_segments,
    spread,
    usual_after,
    with_step,
)
from training.trainer.state_files import read_index

SEED, ROWS_PER_STEP, NUM_STEPS, BAD_STEP = 7, 4, 44, 41
SETTINGS = {
    "seed": SEED, "per_gpu_train_batch_size": 1, "max_steps": BAD_STEP, "save_steps": BAD_STEP - 1, "keep_last": 100,
    "learning_rate": 0.02, "warmup_steps": 4, "lr_scheduler": "warmup", "on_spike": "skip",
}  # fmt: skip
GOES_ON = {"max_steps": NUM_STEPS, "save_steps": 1}  # after the bad step
FOLLOWED = ["zero2", "zero3", "fsdp", "one", "four"]
ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "zero3-offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "lora": {**LORA, "lora_dropout": 0.1, "zero_stage": 2},
    "lora-fsdp": {**LORA, "strategy": "fsdp"},
    "bf16-zero2": {"zero_stage": 2, "precision": "bf16"},
    "bf16-zero3": {"zero_stage": 3, "precision": "bf16"},
}


class TestLimits:
    def ordinary(self, count: int = WINDOW, seed: int = 0) -> list[tuple[float, float]]:
        generator = random.Random(seed)
        return [(2 + generator.gauss(0, 0.1), math.exp(generator.gauss(0, 0.3))) for _ in range(count)]

    def test_nothing_is_out_of_the_ordinary_at_first(self):
        assert limits_after(self.ordinary(LEAST - 1)) == NO_LIMITS
        assert limits_after(self.ordinary(LEAST)).loss < math.inf

    def test_six_sigma_above_the_middle(self):
        limits = limits_after(self.ordinary(seed=1))
        assert limits.loss == pytest.approx(2.65, rel=0.08)
        assert math.log(limits.grad_norm) == pytest.approx(2.0, rel=0.3)

    def test_a_falling_loss_has_no_wider_ones(self):
        falling = [(loss + 5 * 0.95**step, norm) for step, (loss, norm) in enumerate(self.ordinary())]
        assert limits_after(falling).loss < 3.2

    def test_a_step_of_few_rows_varies_more(self):
        whole, few = limits_after(self.ordinary()), limits_after(self.ordinary(), 1 / 16)
        assert few.loss - 2 == pytest.approx(4 * (whole.loss - 2), rel=0.1)
        assert few.grad_norm == pytest.approx(4 * whole.grad_norm)

    def test_norms_with_a_long_tail(self):
        tailed = [(loss, norm * math.exp(3 * (step % 16 == 0))) for step, (loss, norm) in enumerate(self.ordinary())]
        assert limits_after(tailed).grad_norm > math.exp(3) * 5

    def test_spikes_in_the_window_hardly_move_them(self):
        before = limits_after(self.ordinary())
        after = limits_after([*self.ordinary(), (50.0, 1e6), (60.0, 1e7)])
        assert after.loss == pytest.approx(before.loss, rel=0.08)

    def test_only_the_last_steps_count(self):
        assert limits_after([(100.0, 100.0), *self.ordinary()]) == limits_after(self.ordinary())

    def test_a_level_that_stays_becomes_the_ordinary_one(self):
        lasting = [(loss + 10, norm) for loss, norm in self.ordinary()]
        assert limits_after([*self.ordinary(), *lasting[:LEVEL]]).loss > 12

    def test_what_repeats_exactly_may_vary_by_a_little(self):
        limits = limits_after([(1.0, 1.0)] * WINDOW)
        assert not limits.exceeded_by(1.01, 1.01) and limits.exceeded_by(1.07, 1.0) and limits.exceeded_by(1.0, 1.07)

    def test_norms_of_zero(self):
        assert limits_after([(1.0, 0.0)] * WINDOW).grad_norm < 1e-200

    @given(st.lists(st.tuples(st.floats(0, 1e30), st.floats(0, 1e30)), min_size=LEAST, max_size=WINDOW))
    def test_any_numbers(self, recent):
        limits = limits_after(recent)
        assert limits.loss >= np.median([loss for loss, _ in recent[-LEVEL:]]) and limits.grad_norm > 0

    def test_spread_is_sigma_of_a_normal_distribution(self):
        generator = random.Random(3)
        assert spread(np.array([generator.gauss(5, 2) for _ in range(20_000)])) == pytest.approx(2, rel=0.03)

    def test_what_json_gives_back(self):
        recent = self.ordinary()
        assert limits_after(json.loads(json.dumps(recent))) == limits_after(recent)

    def test_either_of_the_two(self):
        assert Limits(2.0, 1.0).exceeded_by(3.0, 0.5) and Limits(2.0, 1.0).exceeded_by(1.0, 1.5)


def segments(losses: np.ndarray, targets: int = 20) -> SegmentLosses:
    places = np.arange(len(losses))
    return SegmentLosses(places, np.zeros_like(places), losses, np.full(len(losses), targets))


class TestUsual:
    def after(self, losses: np.ndarray, steps: int = WINDOW) -> Usual:
        """What is usual after the steps that the losses are dealt out to."""
        recent, histogram = [], []
        for part in np.array_split(losses, steps):
            counts = usual_after(recent, histogram).counts(segments(part))
            recent, histogram = [*recent, (float(part.mean()), 1.0)], with_step(histogram, counts)
        return usual_after(recent, json.loads(json.dumps(histogram)))

    def losses(self, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).normal(3.0, 0.5, 4000)

    def test_nothing_stands_out_at_first(self):
        assert not usual_after([], []).exceeded_by(segments(np.array([1e9])), False).any()
        few = self.after(self.losses()[: LEAST_SEGMENTS - 2], steps=20)
        assert not few.exceeded_by(segments(np.array([1e9])), False).any()

    def test_six_sigma_above_the_middle(self):
        usual = self.after(self.losses())
        assert usual.sigma == pytest.approx(0.5, rel=0.15) and usual.targets == pytest.approx(20)
        assert usual.exceeded_by(segments(np.array([5.0, 7.0, -9.0])), False).tolist() == [False, True, False]

    def test_wider_for_few_targets(self):
        usual, loss = self.after(self.losses()), np.array([7.0])
        assert usual.exceeded_by(segments(loss), False) and not usual.exceeded_by(segments(loss, targets=5), False)

    def test_a_loss_that_falls_widens_nothing(self):
        falling = self.losses() + 7 * 0.97 ** np.repeat(np.arange(WINDOW), 4000 // WINDOW + 1)[:4000]
        assert self.after(falling).sigma == pytest.approx(0.5, rel=0.3)

    def test_a_long_tail_is_no_garbage(self):
        """Short answers: most are known, some are not at all."""
        tailed, others = (np.random.default_rng(seed).exponential(0.5, 4000) for seed in (1, 2))
        assert self.after(tailed).exceeded_by(segments(others), False).sum() <= 1

    def test_much_garbage_is_the_tail_but_for_steps_that_are_spikes(self):
        for each, in_others in ((200, 20), (20, 0)):
            losses = self.losses()
            losses[::each] = 9.0
            usual = self.after(losses)
            assert usual.exceeded_by(segments(losses), False).sum() == in_others
            assert usual.exceeded_by(segments(losses), True).sum() == 4000 // each

    @given(st.integers(0, 30))
    def test_however_the_segments_lie_on_ranks(self, cut):
        usual, losses = Usual(3.0), self.losses()[:30]
        parts = [usual.counts(segments(part)) for part in (losses[:cut], losses[cut:])]
        assert np.array_equal(sum(parts), usual.counts(segments(losses)))

    def test_distances_beyond_all_bins(self):
        counts = Usual(3.0).counts(segments(np.array([1e30, -1e30])))
        assert counts[0] == counts[NUM_BINS - 1] == 1

    def test_segments_of_micro_batches(self):
        """Rows 5 and -1: two segments with three targets and one, and padding."""
        batch = micro_batch(literal_batch(), [5, -1])
        found = losses_of_segments([batch, batch], [torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.zeros(4)])
        assert found.row.tolist() == [5] * 4 and found.number.tolist() == [0, 1, 0, 1]
        assert found.loss.tolist() == [3.0, 4.0, 0.0, 0.0] and found.targets.tolist() == [3, 1, 3, 1]
        assert len(losses_of_segments([], []).loss) == 0


def garbage_rows() -> list[int]:
    """The rows of the bad step: half of it."""
    num_rows = ROWS_PER_STEP * NUM_STEPS
    return rows_of_step(num_rows, ROWS_PER_STEP, SEED, 0, BAD_STEP - 1)[: ROWS_PER_STEP // 2].tolist()


def plan_with_garbage(root: Path) -> Path:
    """Rows of a counting record each, and one of another; two rows count on from nothing."""
    num_rows = ROWS_PER_STEP * NUM_STEPS
    examples = tiny.counting_examples(2 * num_rows)
    generator = random.Random(0)
    for row in garbage_rows():
        examples[2 * row] = example([tiny.BOS, 3, 5], [generator.randrange(3, tiny.VOCABULARY) for _ in range(20)])
    segments = [(i, 0, len(ids)) for i, (ids, _) in enumerate(examples)]
    rows = [segments[start : start + 2] for start in range(0, len(segments), 2)]
    return write_plan(root, examples, max_seq_length=48, rows=rows, validation=rows[:2], pad_id=tiny.PAD)


def plan_with_one_bad_record(root: Path) -> tuple[Path, int]:
    """(Plan of rows of many counting records, place of the one in the bad step that is garbage)."""
    num_rows, each = ROWS_PER_STEP * NUM_STEPS, 24
    examples = tiny.counting_examples(each * num_rows)
    bad = each * garbage_rows()[0] + 5
    generator = random.Random(0)
    examples[bad] = example([tiny.BOS, 3, 5], [generator.randrange(3, tiny.VOCABULARY) for _ in range(8)])
    segments = [(i, 0, len(ids)) for i, (ids, _) in enumerate(examples)]
    rows = [segments[start : start + each] for start in range(0, len(segments), each)]
    return write_plan(root, examples, max_seq_length=320, rows=rows, pad_id=tiny.PAD), bad


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs of every engine that skip; on 1, 2 and 4 ranks; killed and resumed; that warn, and that go back."""
    root = tmp_path_factory.mktemp("spikes")
    plan = plan_with_garbage(root / "cache")
    lone = plan_with_one_bad_record(root / "cache")[0]
    base = tiny.write_run(root, "base", plan_dir=plan, **SETTINGS | {"max_steps": 40, "gradient_accumulation_steps": 2})

    def write(name: str, ranks: int, **settings) -> dict:
        model = {"model_dir": base / "model"} if "use_lora" in settings else {}
        accumulation = {"gradient_accumulation_steps": ROWS_PER_STEP // ranks}
        settings = {"plan_dir": plan, **SETTINGS, **accumulation, **model, **settings}
        tiny.write_run(root, name, **settings)
        return {"run_dir": str(root / name)}

    def followed(name: str) -> dict:
        return GOES_ON if name in FOLLOWED else {}

    def killed(name: str, source: Path, drop: list[str], **settings) -> dict:
        copy = {"from": str(source), "drop": drop}
        return write(name, 2, **settings) | {"resume": True, "copy": copy}

    def start(ranks: int, runs: list[dict]) -> None:
        together = root / f"start-{time.monotonic_ns()}"
        together.mkdir()
        (together / "config.yaml").write_text(yaml.safe_dump({"runs": runs}))
        codes = tiny.wait(tiny.start(together, ranks, module="tests.support.many"), seconds=300)
        assert codes == [0] * ranks, tiny.logs(together)

    two = [
        {"run_dir": str(base)},
        *(write(name, 2, **followed(name), **settings) for name, settings in ENGINES.items()),
    ]
    rewinds = {"on_spike": "rewind", "save_steps": 15, "max_steps": NUM_STEPS}
    two.append(write("rewind", 2, **rewinds))
    later = [f"step-{step:06d}" for step in range(BAD_STEP - 3, NUM_STEPS + 1)]
    two += [
        killed("skip-again", root / "zero2", later, **GOES_ON),
        killed("rewind-again", root / "rewind", ["step-000044"], **rewinds),
    ]
    two += [
        *(
            write(f"back-{name}", 2, **{**rewinds, "max_steps": BAD_STEP}, **ENGINES[name])
            for name in ("zero0", "zero2", "zero3", "fsdp")
        ),
        write("warn", 2, on_spike="warn", **GOES_ON),
        write("off", 2, on_spike="off", **GOES_ON),
        write("nowhere-to-go", 2, on_spike="rewind", save_steps=1000),
    ]
    seen = {"plan_dir": lone, **GOES_ON}
    two += [write(f"lone-{name}", 2, **seen, **ENGINES[name]) for name in ("zero2", "zero3", "fsdp", "bf16-zero2")]
    two.append(killed("lone-again", root / "lone-zero2", later, **seen))
    start(2, two)
    start(1, [write("one", 1, **GOES_ON), write("one-on-fsdp", 1, strategy="fsdp"), write("lone-one", 1, **seen)])
    start(4, [write("four", 4, **GOES_ON), write("four-zero3", 4, zero_stage=3), write("lone-four", 4, **seen)])
    return root


def spikes(root: Path, name: str) -> list[dict]:
    return tiny.metrics(root / name, "spikes.jsonl")


def same_tensors(ours: Path, others: Path) -> bool:
    left, right = read_index(ours), read_index(others)
    return left.keys() == right.keys() and all(
        torch.equal(stored.whole(), right[name][key].whole())
        for name, states in left.items()
        for key, stored in states.items()
    )


def at(root: Path, name: str, step: int) -> Path:
    return root / name / "checkpoints" / f"step-{step:06d}"


@pytest.mark.distributed
class TestRuns:
    @pytest.mark.parametrize("name", [*ENGINES, "one", "one-on-fsdp", "four", "four-zero3", "warn", "rewind"])
    def test_one_spike_and_its_records(self, root, name):
        (spike,) = spikes(root, name)
        assert spike["step"] == BAD_STEP
        assert sorted(one["line"] for one in spike["records"]) == sorted(2 * row + 1 for row in garbage_rows())
        assert all(one["target_tokens"] == 20 and len(one["hash"]) == 32 for one in spike["records"])

    @pytest.mark.parametrize("name", [*ENGINES, "one", "one-on-fsdp", "four", "four-zero3"])
    def test_the_step_makes_no_update(self, root, name):
        assert same_tensors(at(root, name, BAD_STEP), at(root, name, BAD_STEP - 1))
        trained = json.loads((root / name / "train.json").read_text())
        assert (trained["spikes"], trained["steps_without_update"]) == (1, 1)

    @pytest.mark.parametrize("name", FOLLOWED)
    def test_the_next_one_does(self, root, name):
        assert not same_tensors(at(root, name, BAD_STEP + 1), at(root, name, BAD_STEP))

    @pytest.mark.parametrize("name", ["warn", "off"])
    def test_otherwise_it_is_trained_on(self, root, name):
        assert not same_tensors(at(root, name, BAD_STEP), at(root, name, BAD_STEP - 1))
        assert len(spikes(root, name)) == (name == "warn")
        assert same_tensors(at(root, "warn", NUM_STEPS), at(root, "off", NUM_STEPS))  # looking changes nothing

    @pytest.mark.parametrize("name", ["one", "four", "zero0", "zero3", "fsdp", "one-on-fsdp", "four-zero3"])
    def test_the_same_on_any_number_of_ranks(self, root, name):
        (ours,), (others,) = spikes(root, name), spikes(root, "zero2")
        for key in ("loss", "grad_norm", "loss_limit", "grad_norm_limit"):
            assert ours[key] == pytest.approx(others[key], rel=1e-3), key
        losses = tiny.losses(tiny.metrics(root / name))
        assert losses == pytest.approx(tiny.losses(tiny.metrics(root / "zero2"))[: len(losses)], rel=1e-3)

    @pytest.mark.parametrize(("name", "source"), [("skip-again", "zero2"), ("rewind-again", "rewind")])
    def test_killed_and_resumed_it_does_the_same(self, root, name, source):
        def told(run: str) -> list[dict]:
            return [{key: value for key, value in one.items() if key != "time"} for one in spikes(root, run)]

        assert told(name) == told(source)
        assert same_tensors(at(root, name, NUM_STEPS), at(root, source, NUM_STEPS))

    @pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "fsdp"])
    def test_it_goes_back_to_the_checkpoint(self, root, name):
        (spike,) = spikes(root, f"back-{name}")
        assert (spike["done"], spike["back_to"]) == ("rewound", 30)
        trained = json.loads((root / f"back-{name}" / "train.json").read_text())
        assert trained["steps_without_update"] == BAD_STEP - 30
        assert same_tensors(at(root, f"back-{name}", BAD_STEP), at(root, f"back-{name}", 30))

    def test_without_a_checkpoint_it_skips(self, root):
        (spike,) = spikes(root, "nowhere-to-go")
        assert spike["done"] == "skipped" and "back_to" not in spike

    @pytest.mark.parametrize("name", ["one", "zero2", "zero3", "fsdp", "bf16-zero2", "again", "four"])
    def test_a_lone_record_is_named_and_trained_on(self, root, name):
        bad = plan_with_one_bad_record(root / "cache")[1]
        assert not spikes(root, f"lone-{name}")
        lines = tiny.metrics(root / f"lone-{name}", "standing_out.jsonl")
        named = {line["step"]: [one["line"] for one in line["records"]] for line in lines}
        assert named.pop(BAD_STEP) == [bad + 1]
        assert len(named) <= (name == "bf16-zero2"), "one more is hard in 16 bits, early on"
        assert not same_tensors(at(root, f"lone-{name}", BAD_STEP), at(root, f"lone-{name}", BAD_STEP - 1))
