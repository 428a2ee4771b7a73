"""The reader on rows small enough to check by eye."""

import numpy as np
import pytest

from data_prep import store
from data_prep.errors import StoreError
from data_prep.plan.reader import open_plan, target_ranges
from data_prep.tokens.token_shard import TOKENS_FILE, open_shard, write_shard
from tests.support.plans import example, make_shard, write_plan

PROMPT_ANSWER = example([10, 11], [12, 13, 2])
DOCUMENT = example([], [20, 21, 22, 23])
CHAT = example([30], [31, 2], [32, 33], [34, 2])


def test_one_row_of_two_segments(tmp_path):
    plan = open_plan(
        write_plan(
            tmp_path, [PROMPT_ANSWER, DOCUMENT], max_seq_length=16, pad_id=2, example_sources=[0, 1],
            rows=[[(0, 0, 5), (1, 0, 2)], [(0, 0, 5), (1, 0, 4)]], sources=["instruction", "pretraining"],
        ),
        "train",
    )  # fmt: skip
    batch = plan.batch(np.array([0, 1]))
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 2, 20, 21, 2, 2], [10, 11, 12, 13, 2, 20, 21, 22, 23]]
    assert batch.labels.tolist() == [
        [-100, -100, 12, 13, 2, -100, 21, -100, -100],
        [-100, -100, 12, 13, 2, -100, 21, 22, 23],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.sources.tolist() == [[0, 0, 0, 0, 0, 1, 1, -1, -1], [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype} == {np.dtype(np.int64)}
    assert batch.sources.dtype == np.int8
    assert plan.num_rows == 2
    assert plan.row_tokens.tolist() == [7, 9]
    assert plan.row_target_tokens.tolist() == [4, 6]
    assert plan.sources == ["instruction", "pretraining"]
    assert plan.manifest["max_seq_length"] == 16


def test_every_assistant_turn_is_a_target(tmp_path):
    plan = open_plan(write_plan(tmp_path, [CHAT], max_seq_length=8), "train")
    assert plan.batch(np.array([0])).labels.tolist() == [[-100, 31, 2, -100, -100, 34, 2]]


def test_a_part_of_an_example_restarts_and_its_first_label_is_ignored(tmp_path):
    plan = open_plan(write_plan(tmp_path, [CHAT], max_seq_length=8, rows=[[(0, 0, 2), (0, 2, 5)]]), "train")
    batch = plan.batch(np.array([0]))
    assert batch.input_ids.tolist() == [[30, 31, 2, 32, 33, 34, 2]]
    assert batch.labels.tolist() == [[-100, 31, -100, -100, -100, 34, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4]]


def test_minus_one_is_an_all_padding_row(tmp_path):
    plan = open_plan(write_plan(tmp_path, [PROMPT_ANSWER], max_seq_length=8, pad_id=9), "train")
    batch = plan.batch(np.array([0, -1]))
    assert batch.input_ids[1].tolist() == [9] * 5
    assert batch.labels[1].tolist() == [-100] * 5
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 4]
    assert plan.batch(np.array([-1, -1])).input_ids.shape == (2, 1)


def test_row_target_tokens_are_the_labels_that_count(tmp_path):
    plan = open_plan(write_plan(tmp_path, [PROMPT_ANSWER, DOCUMENT, CHAT], max_seq_length=8), "train")
    labels = plan.batch(np.arange(3)).labels
    assert (labels != -100).sum(axis=1).tolist() == plan.row_target_tokens.tolist() == [3, 3, 4]


def test_validation_rows_are_apart(tmp_path):
    path = write_plan(
        tmp_path, [PROMPT_ANSWER, DOCUMENT], max_seq_length=8, rows=[[(0, 0, 5)]], validation=[[(1, 0, 4)]]
    )
    assert open_plan(path, "validation").batch(np.array([0])).input_ids.tolist() == [[20, 21, 22, 23]]
    assert open_plan(path, "train").num_rows == 1


def test_origins_name_file_and_line(tmp_path):
    plan = open_plan(
        write_plan(tmp_path, [PROMPT_ANSWER, DOCUMENT], max_seq_length=16, rows=[[(1, 0, 4), (0, 0, 5)]]), "train"
    )
    assert plan.origins(0) == [("memory.json", 2), ("memory.json", 1)]


def test_a_damaged_shard_is_named(tmp_path):
    path = write_plan(tmp_path, [PROMPT_ANSWER], max_seq_length=8)
    (shard,) = (tmp_path / "tokens").iterdir()
    with (shard / TOKENS_FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match=TOKENS_FILE):
        open_plan(path, "train").batch(np.array([0]))
    assert store.verify(shard) == [TOKENS_FILE]


@pytest.mark.parametrize(
    ("runs", "start", "length", "expected"),
    [
        ([2, 3], 0, 5, [(2, 5)]),
        ([2, 3], 0, 4, [(2, 4)]),
        ([0, 4], 0, 4, [(1, 4)]),
        ([0, 4], 2, 2, [(1, 2)]),
        ([2, 3], 3, 2, [(1, 2)]),
        ([2, 1, 2, 1], 0, 6, [(2, 3), (5, 6)]),
        ([5], 0, 5, []),
        ([2, 3], 4, 1, []),
    ],
)
def test_target_ranges(runs, start, length, expected):
    assert target_ranges(np.array(runs), start, length) == expected


def test_a_shard_is_read_back_as_written(tmp_path):
    shard = make_shard([PROMPT_ANSWER, DOCUMENT, CHAT])
    write_shard(tmp_path / TOKENS_FILE, shard)
    back = open_shard(tmp_path / TOKENS_FILE)
    assert back.ids.tolist() == shard.ids.tolist()
    assert back.lengths.tolist() == [5, 4, 7]
    assert back.target_mask(2).tolist() == [False, True, True, False, False, True, True]
