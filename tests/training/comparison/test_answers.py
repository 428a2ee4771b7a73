"""Answers of a real tiny model to prompts that leave it little: none at all, or a context of few positions."""

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from data_prep.tokenizer import load_tokenizer
from tests.support.plans import example, make_shard
from tests.support.ranks_here import alone
from tests.support.tiny_models import save_full_model, save_tokenizer
from training.comparison import scores as scoring
from training.comparison.heldout import HeldOut
from training.comparison.job import ModelUnderTest
from training.comparison.scores import generate
from training.comparison.statistics import unusable
from training.engines.inference import UsedModel, load_for_inference
from training.settings import TrainSettings

EMPTY, FULL = [], [40, 41, 42]


@pytest.mark.parametrize("prompts", [[EMPTY], [EMPTY, FULL]], ids=["alone", "beside another"])
def test_an_empty_prompt_is_answered_as_the_beginning_of_a_text(prompts, tmp_path):
    """An empty instruction under a tokenizer without bos: the model begins after eos."""
    model = UsedModel(save_full_model(tmp_path).eval())
    tokenizer = load_tokenizer(tmp_path)
    with alone() as ranks:
        said = generate(model, tokenizer, prompts, [[50]] * len(prompts), 8, ranks)
        assert said[0] == generate(model, tokenizer, [[tokenizer.eos_id]], [[50]], 8, ranks)[0]


def test_a_prompt_keeps_a_token_however_small_the_context_is():
    shard = make_shard([example([1, 2, 3], [4, 5])])
    assert scoring.prompts_of(shard, [0], 1) == ([[3]], [[4, 5]])
    assert scoring.prompts_of(shard, [0], 9) == ([[1, 2, 3]], [[4, 5]])


def test_a_model_with_fewer_positions_than_an_answer_is_asked_within_them(tmp_path):
    """GPT-2 has an embedding for each position, and nothing beyond."""
    import pyarrow as pa

    from data_prep.records.turns import Role

    size = len(save_tokenizer(tmp_path))
    GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_positions=48, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    texts = [["What is this?" * 4, "A test."], ["Say it.", "It."]]
    held_out = HeldOut(
        hashes=["a", "b"],
        sources=["instruction"] * 2,
        languages=["other"] * 2,
        places=["here:1", "here:2"],
        roles=pa.array([[Role.USER, Role.ASSISTANT]] * 2, pa.list_(pa.int8())),
        texts=pa.array(texts, pa.list_(pa.large_string())),
        num_excluded=0,
    )
    with alone() as ranks:
        model = load_for_inference(tmp_path, TrainSettings(), ranks)
        asking = scoring.Asking(2, ranks, tmp_path / "cache")
        scores, answers = scoring.score(model, ModelUnderTest("gpt", "plain", str(tmp_path)), held_out, asking)
    assert len(answers) == 2 and np.isfinite(scores.losses).all() and not unusable(scores)
