"""Readers that a user has written: data sets of torch and of datasets, that of PandaLLM's guide, and wrong ones."""

import json
from pathlib import Path

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

PAIRS = [{"input": f"question {i}", "target": f"answer {i}"} for i in range(5)]


class Pairs(Dataset):
    """As `TextDatasetUnifyV3` of PandaLLM: files of its own beside `file_path`, and pairs of records."""

    def __init__(self, file_path, tokenizer, pair_file_list=None):
        assert tokenizer.eos_token
        self.data = [
            {"inputs": one["input"], "targets": one["target"]} for one in json.loads(Path(file_path).read_text())
        ]
        self.documents = []
        for path in sorted(Path().glob(pair_file_list)) if pair_file_list else ():
            self.documents += [{"inputs": "", "targets": text} for text in json.loads(path.read_text())]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        """Any index gives something, so going on until IndexError would never end."""
        record = {"flan": self.data[index % len(self.data)]}
        return record | ({"extra": self.documents[index]} if self.documents else {})


class Stream(IterableDataset):
    def __init__(self, file_path, **_):
        self.path = file_path

    def __iter__(self):
        yield from json.loads(Path(self.path).read_text())


def of_datasets(file_path, tokenizer):
    return datasets.Dataset.from_list(json.loads(Path(file_path).read_text()))


def splits(file_path):
    return datasets.DatasetDict({"train": of_datasets(file_path, None)})


def with_eos(path, tokenizer):
    for one in json.loads(Path(path).read_text()):
        yield one | {"target": f"{one['target']} {tokenizer.eos_token} {len(tokenizer('ab')['input_ids'])}"}


def named_in_the_node(path, tokenizer):
    yield {"input": tokenizer, "target": Path(path).name}


def any_keyword(**given):
    return [{"input": Path(given["file_path"]).name, "target": given["tokenizer"].eos_token, "more": given["more"]}]


def tensors(file_path):
    return torch.utils.data.TensorDataset(torch.arange(6).reshape(3, 2))


def tokenized(file_path):
    yield {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}


def arrays(path):
    yield {"input": "a", "target": "b"}
    yield np.arange(3)


def nothing(path):
    return None


class NoLength:
    def __init__(self, path):
        pass

    def __getitem__(self, index):
        return PAIRS[0]
