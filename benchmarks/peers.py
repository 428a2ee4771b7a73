"""One program on one corpus, to be timed from outside: ours, datasets + TRL, datatrove.

    python -m benchmarks.peers trl CORPUS TOKENIZER_DIR WORK_DIR

They do what their documentation shows. TRL: load_dataset, map to ids and mask, pack_dataset. datatrove: tokenizing
alone (it neither masks nor packs). The extra `bench` of the project installs both.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

CORES = len(os.sched_getaffinity(0))


def ours(data: Path, tokenizer: Path, work: Path) -> None:
    """JSON in; ledger, masked tokens and a global pack plan out."""
    from benchmarks.prepare import settings_of
    from data_prep.pipeline import prepare
    from data_prep.settings import PackSettings, TokenizeSettings

    prepare(settings_of(data), TokenizeSettings(), PackSettings(), tokenizer, work)


def trl(data: Path, tokenizer: Path, work: Path) -> None:
    """datasets.load_dataset + map + TRL's pack_dataset (best fit, in its default batches of 1,000)."""
    from datasets import concatenate_datasets, load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    loaded = AutoTokenizer.from_pretrained(str(tokenizer))

    def encode_pairs(batch: dict) -> dict:
        prompts = [a + ("\n" + b if b else "") for a, b in zip(batch["instruction"], batch["input"], strict=True)]
        first = loaded(prompts, add_special_tokens=False)["input_ids"]
        second = loaded(batch["output"], add_special_tokens=False)["input_ids"]
        ids = [a + b + [loaded.eos_token_id] for a, b in zip(first, second, strict=True)]
        masks = [[0] * len(a) + [1] * (len(b) + 1) for a, b in zip(first, second, strict=True)]
        return {"input_ids": ids, "completion_mask": masks}

    def encode_texts(batch: dict) -> dict:
        ids = [[*ids, loaded.eos_token_id] for ids in loaded(batch["text"], add_special_tokens=False)["input_ids"]]
        return {"input_ids": ids, "completion_mask": [[1] * len(one) for one in ids]}

    parts = []
    for kind, encode in (("instruction", encode_pairs), ("pretraining", encode_texts)):
        files = sorted(str(path) for path in (data / kind).iterdir())
        raw = load_dataset("json", data_files=files, split="train", cache_dir=str(work / "cache"))
        parts.append(raw.map(encode, batched=True, num_proc=CORES, remove_columns=raw.column_names))
    packed = pack_dataset(
        concatenate_datasets(parts), seq_length=2048, strategy="bfd_split", map_kwargs={"num_proc": CORES}
    )
    packed.save_to_disk(str(work / "packed"))


def datatrove(data: Path, tokenizer: Path, work: Path) -> None:
    """datatrove's LocalPipelineExecutor with its DocumentTokenizer, a task a core."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(data / "lines"), glob_pattern="*.jsonl"),
            DocumentTokenizer(str(work / "tokens"), str(tokenizer / "tokenizer.json"), shuffle_documents=False),
        ],
        tasks=CORES,
        workers=CORES,
        logging_dir=str(work / "logs"),
    ).run()


def lines(data: Path, tokenizer: Path, work: Path) -> None:
    """The same texts as JSON Lines of {text}, a file a core: what datatrove reads. Not part of its time."""
    from benchmarks.prepare import texts_of

    (data / "lines").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        names = [data / "lines" / f"{number}.jsonl" for number in range(CORES)]
        streams = [stack.enter_context(name.open("w", encoding="utf-8")) for name in names]
        for number, text in enumerate(texts_of(data)):
            streams[number % CORES].write(json.dumps({"text": text, "id": str(number)}, ensure_ascii=False) + "\n")


PROGRAMS = {"ours": ours, "trl": trl, "lines": lines, "datatrove": datatrove}

if __name__ == "__main__":
    multiprocessing.freeze_support()
    PROGRAMS[sys.argv[1]](*map(Path, sys.argv[2:]))
