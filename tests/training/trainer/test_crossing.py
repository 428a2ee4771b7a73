"""A checkpoint of any engine, on any number of ranks, put into any other is the same, bit by bit.

Run as a module it is a rank: it trains two steps under every engine, saves, and puts every checkpoint of two ranks
into every engine, which saves it again.
"""

import argparse
from pathlib import Path

import pytest
import torch
import yaml

from tests.support import tiny
from training.trainer.state_files import read_index

pytestmark = pytest.mark.distributed

ENGINES = {
    "zero0": {"zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp": {"strategy": "fsdp"},
}
LAST = "step-000002"


def rank() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    root = parser.parse_args().config.parent
    from tests.training.models.test_loss import literal_batch
    from tests.training.models.test_loss import tiny as model
    from training.distributed import join, leave, this_rank
    from training.engines.build import build_engine
    from training.models.loss import micro_batch
    from training.settings import TrainSettings
    from training.trainer import checkpoint
    from training.trainer.checkpoint import Progress
    from training.trainer.saver import Saver

    ranks = this_rank()
    join(ranks)

    def engine_of(name):
        return build_engine(model(), TrainSettings(**ENGINES[name]), ranks)

    def save(engine, name):
        saver = Saver(root / f"{name}-{ranks.world_size}", ranks)
        saver.save(engine, Progress(step=2))
        saver.wait()

    for name in ENGINES if ranks.world_size == 2 else ():
        engine = engine_of(name)
        for _ in range(2):
            engine.backward(engine.forward(micro_batch(literal_batch(), [0, 1]))[0] / 4, last=True)
            engine.step(1e-3)
        save(engine, name)
    for source in [root / f"{name}-2" for name in ENGINES]:
        for name in ENGINES:
            engine = engine_of(name)
            checkpoint.load(engine, source / LAST)
            save(engine, f"{source.name}-on-{name}")
    leave()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("crossing")
    (root / "config.yaml").write_text(yaml.safe_dump({}))
    for world_size in (2, 1):
        codes = tiny.wait(tiny.start(root, world_size, module="tests.training.trainer.test_crossing"))
        assert codes == [0] * world_size, tiny.logs(root)
    return root


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize("source", ENGINES)
@pytest.mark.parametrize("world_size", [2, 1])
def test_the_same_weights_and_states(root, source, target, world_size):
    ours = read_index(root / f"{source}-2-on-{target}-{world_size}" / LAST)
    others = read_index(root / f"{source}-2" / LAST)
    assert ours.keys() == others.keys() and len(others) > 10
    for name, states in others.items():
        assert set(states) == set(ours[name]) == {"weight", "step", "exp_avg", "exp_avg_sq"}
        for key, stored in states.items():
            assert stored.shape == ours[name][key].shape
            assert torch.equal(stored.whole(), ours[name][key].whole()), (name, key)


def test_every_rank_has_written_about_half(root):
    for engine in ENGINES:
        sizes = [file.stat().st_size for file in sorted((root / f"{engine}-2" / LAST).glob("state-*"))]
        assert len(sizes) == 2 and min(sizes) > 0.4 * sum(sizes)


if __name__ == "__main__":
    from training.launch.exits import run_rank

    run_rank(rank)
