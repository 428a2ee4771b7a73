"""The order of the stages, who may stand around them, and the tokenizer of a model from scratch."""

import pytest
from tokenizers import Tokenizer

from configs.settings import PandaSettings
from data_prep.pipeline import Preparation, run_stages
from data_prep.sample import write_sample


class Watched:
    """Stages with something around each; may end the run after one of them."""

    def __init__(self, stages: Preparation, last: str | None = None):
        self.stages = stages
        self.last = last
        self.seen: list[str] = []

    def __getattr__(self, name: str):
        def stage(*results):
            made = getattr(self.stages, name)(*results)
            self.seen.append(name)
            if name == self.last:
                raise InterruptedError(name)
            return made

        return stage


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Preparation:
    root = tmp_path_factory.mktemp("pipeline")
    write_sample(root / "sample")
    settings = PandaSettings(
        instruction_tuning_data_dir=str(root / "sample/instruction_tuning"), pretraining_data_dir=None,
        architecture={"vocab_size": 300}, tombstones=None,
    )  # fmt: skip
    return Preparation.of(settings, None, root / "cache")


def test_all_stages_in_their_order_with_something_around_each(stages):
    watched = Watched(stages)
    result = run_stages(watched)
    assert watched.seen == ["records", "tokenizer", "tokens", "plan"]
    assert result.report["records_in"] == result.report["accepted"] + sum(
        sum(result.report[name].values()) for name in ("rejected", "dropped")
    )
    assert Tokenizer.from_file(f"{result.tokenizer_dir}/tokenizer.json").get_vocab_size() == 300
    assert run_stages(stages).reused


def test_a_run_may_end_between_two_stages(stages):
    watched = Watched(stages, "tokens")
    with pytest.raises(InterruptedError, match="tokens"):
        run_stages(watched)
    assert watched.seen == ["records", "tokenizer", "tokens"]
