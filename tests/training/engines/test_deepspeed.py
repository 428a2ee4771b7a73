"""What the engine does on a GPU only shows in what it asks of torch."""

import subprocess
import sys

import pytest

LOOK = """
from torch import nn
from tests.training.models.test_loss import tiny
from training.engines.deepspeed import DeepSpeedEngine
from training.distributed import join, leave, this_rank
from training.settings import TrainSettings

moved, move = [], nn.Module.to

def to(module, *arguments, **options):
    moved.append(sum(parameter.numel() for parameter in module.parameters()))
    return move(module, *arguments, **options)

nn.Module.to = to
ranks = this_rank()
join(ranks)
engine = DeepSpeedEngine.build(tiny(), TrainSettings(zero_stage=3, precision="bf16"), ranks)
print("moved at once:", max(moved, default=0), "trained:", len(engine.trained()))
leave()
"""


@pytest.mark.distributed
def test_zero_3_never_moves_the_whole_model():
    """A model that only fits sharded must not be on a GPU whole, not even for a moment at the start."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    facts = [line for line in done.stdout.splitlines() if line.startswith("moved at once")]
    assert facts[0].startswith("moved at once: 0 trained: ") and int(facts[0].split()[-1]) > 10
