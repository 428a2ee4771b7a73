"""A large corpus made from a small real one, for benchmarks: no sentence is repeated, and new words keep coming.

In: real records (Chinese and English), a size, a seed. Out: one JSON array of instruction records and one JSON Lines
file of documents. English: words drawn by their real frequency, 4 % of them altered so that caches of words do not
flatter anybody; Chinese: random cuts of real text, which hardly repeat. Cost: 20 MB/s.

    python -m benchmarks.corpus --real CORPORA --megabytes 100 --out /tmp/corpus
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

NEW_WORDS = 0.04
SHORT_RECORDS_PER_FILE = 260


def main() -> None:
    """Write a corpus."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--real", type=Path, required=True)
    options.add_argument("--megabytes", type=int, default=100)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    write_corpus(given.real, given.out, given.megabytes, given.seed)


def write_corpus(real: Path, out: Path, megabytes: int, seed: int = 0, name: str = "made") -> None:
    """Three fifths of the bytes are instruction records, the others documents."""
    english, chinese = real_texts(real)
    make = TextMaker(english, chinese, np.random.default_rng(seed))
    (out / "instruction").mkdir(parents=True, exist_ok=True)
    (out / "pretraining").mkdir(parents=True, exist_ok=True)
    with (out / "instruction" / f"{name}.json").open("w", encoding="utf-8") as stream:
        stream.write("[\n")
        size = 0
        while size < 0.6e6 * megabytes:
            record = {
                "instruction": make.text(120),
                "input": make.text(60) if make.chance() else "",
                "output": make.text(900),
            }
            text = json.dumps(record, ensure_ascii=False)
            stream.write((",\n" if size else "") + text)
            size += len(text.encode())
        stream.write("\n]\n")
    with (out / "pretraining" / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
        size = 0
        while size < 0.4e6 * megabytes:
            text = json.dumps({"text": make.text(3000)}, ensure_ascii=False)
            stream.write(text + "\n")
            size += len(text.encode())


def write_short_corpus(real: Path, out: Path, num_records: int, seed: int = 0) -> None:
    """Short Chinese texts, about 227 bytes a record: half documents in many small arrays, half answers in one file."""
    rng = np.random.default_rng(seed)
    _, chinese = real_texts(real)
    (out / "instruction").mkdir(parents=True, exist_ok=True)
    (out / "pretraining").mkdir(parents=True, exist_ok=True)
    num_documents = num_records // 2
    for first in range(0, num_documents, SHORT_RECORDS_PER_FILE):
        count = min(SHORT_RECORDS_PER_FILE, num_documents - first)
        titles, contents = (short_texts(chinese, count, length, rng) for length in (8, 60))
        records = ({"title": title, "content": content} for title, content in zip(titles, contents, strict=True))
        text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (out / "pretraining" / f"made-{first:07}.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
    count = num_records - num_documents
    asked, answered = (short_texts(chinese, count, length, rng) for length in (18, 50))
    with (out / "instruction" / "made.jsonl").open("w", encoding="utf-8") as stream:
        for question, answer in zip(asked, answered, strict=True):
            stream.write(json.dumps({"instruction": question, "output": answer}, ensure_ascii=False) + "\n")


def short_texts(chinese: str, count: int, length: int, rng: np.random.Generator) -> list[str]:
    """So many texts of about ``length`` characters, each of two cuts of the real text."""
    sizes = 1 + rng.poisson(length / 2, (count, 2))
    starts = rng.integers(0, len(chinese) - sizes.max(), (count, 2))
    cuts = np.stack([starts, starts + sizes], axis=2).reshape(count, 4).tolist()
    return [chinese[a:b] + chinese[c:d] for a, b, c, d in cuts]


def real_texts(real: Path) -> tuple[str, str]:
    """All English and all Chinese text of the real corpora."""
    texts: list[str] = []
    for path in sorted(real.rglob("*.json")):
        texts += [text for record in json.loads(path.read_text(encoding="utf-8")) for text in record.values()]
    for path in sorted(real.rglob("*.jsonl")):
        texts += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    is_chinese = re.compile(r"[\u4e00-\u9fff]")
    return (
        "\n".join(text for text in texts if not is_chinese.search(text)),
        "\n".join(text for text in texts if is_chinese.search(text)),
    )


class TextMaker:
    """Draws texts of about a wanted length, half of them Chinese."""

    def __init__(self, english: str, chinese: str, rng: np.random.Generator):
        self.words = np.array(re.findall(r"\S+\s*", english), dtype=object)
        self.chinese = chinese
        self.rng = rng

    def chance(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def text(self, length: int) -> str:
        """About ``length`` characters of English, or a third of that in Chinese: as many bytes."""
        wanted = max(8, int(self.rng.exponential(length)))
        return self._cuts(wanted // 3) if self.chance() else self._sentence(wanted // 6 + 1)

    def _sentence(self, num_words: int) -> str:
        words = self.words[self.rng.integers(0, len(self.words), num_words)]
        for index in np.flatnonzero(self.rng.random(num_words) < NEW_WORDS).tolist():
            word = list(words[index])
            self.rng.shuffle(word)
            words[index] = "".join(word)
        return "".join(words)

    def _cuts(self, length: int) -> str:
        parts = []
        while length > 0:
            cut = int(self.rng.integers(2, 24))
            start = int(self.rng.integers(0, len(self.chinese) - cut))
            parts.append(self.chinese[start : start + cut])
            length -= cut
        return "".join(parts)


if __name__ == "__main__":
    main()
