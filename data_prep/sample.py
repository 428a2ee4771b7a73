"""A sample corpus to try the pipeline on: small, learnable, in English and Chinese, with every kind of bad record.

In: a directory. Out: ``instruction_tuning/*`` and ``pretraining/*`` below it, the same bytes every time.
A tiny model learns it in a minute or two, because the answers follow from the questions. A few records are broken or
repeated on purpose, so that the data report has something to explain. Cost: well under a second.
"""

import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

COLOURS = {
    "red": "红色",
    "blue": "蓝色",
    "green": "绿色",
    "white": "白色",
    "black": "黑色",
    "golden": "金色",
    "grey": "灰色",
}
PLACES = {"forest": "森林", "river": "河边", "village": "村庄", "hills": "山上", "garden": "花园", "city": "城市"}
SIZES = {"small": "小", "big": "大", "young": "小", "old": "老"}
DIETS = {
    "panda": ("熊猫", "bamboo", "竹子"), "horse": ("马", "grass", "青草"), "rabbit": ("兔子", "carrots", "胡萝卜"),
    "crane": ("鹤", "fish", "小鱼"), "monkey": ("猴子", "bananas", "香蕉"), "cat": ("猫", "mice", "老鼠"),
    "bee": ("蜜蜂", "nectar", "花蜜"), "squirrel": ("松鼠", "nuts", "坚果"), "bear": ("熊", "honey", "蜂蜜"),
}  # fmt: skip


def write_sample(folder: Path, seed: int = 7) -> None:
    """Write the corpus below `folder`; a corpus that is there already stays as it is."""
    if folder.exists():
        return
    draw = random.Random(seed)
    animals = list(itertools.product(DIETS, COLOURS, PLACES, SIZES))
    draw.shuffle(animals)
    english = [record for animal in animals[:500] for record in _english(*animal)]
    chinese = [record for animal in animals[500:900] for record in _chinese(*animal)]
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    _write(temporary / "instruction_tuning" / "english.json", json.dumps([*english, *_bad()], indent=1))
    _write(temporary / "instruction_tuning" / "chinese.jsonl", _lines(chinese) + '{"input": "断了的记录", "target": \n')
    _write(temporary / "pretraining" / "stories.jsonl", _lines(_stories(draw, animals[900:1000])))
    try:
        temporary.rename(folder)
    except OSError:  # another run has written it meanwhile: the same bytes
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise


def _english(animal: str, colour: str, place: str, size: str) -> list[dict[str, str]]:
    food = DIETS[animal][1]
    return [
        {
            "instruction": f"What does the {size} {colour} {animal} from the {place} eat?",
            "input": "",
            "output": f"The {animal} eats {food}.",
        },
        {
            "instruction": "Which animal is in the text, and what does it like?",
            "input": f"There is a {colour} {animal} near the {place}. It is {size}.",
            "output": f"It is a {animal}. A {animal} likes {food}.",
        },
    ]


def _chinese(animal: str, colour: str, place: str, size: str) -> list[dict[str, str]]:
    name, _, food = DIETS[animal]
    who = f"{PLACES[place]}的{COLOURS[colour]}{SIZES[size]}{name}"
    return [
        {"input": f"{who}吃什么？", "target": f"{name}吃{food}。"},
        {"input": f"请介绍{who}。", "target": f"这是一只{name}，它每天都吃{food}。"},
    ]


def _stories(draw: random.Random, animals: list[tuple[str, str, str, str]]) -> Iterator[dict[str, str]]:
    for number, (animal, colour, place, size) in enumerate(animals):
        food = DIETS[animal][1]
        days = " ".join(
            f"On day {day} it went to the {draw.choice(list(PLACES))}." for day in range(1, draw.randint(3, 9))
        )
        yield {
            "title": f"Story {number}: the {animal} of the {place}",
            "content": f"A {size} {colour} {animal} lived near the {place}. It ate {food} every day. {days}",
        }


def _bad() -> list[object]:
    """What real corpora contain: empty answers, missing fields, wrong types, repetitions."""
    twice = {"instruction": "Say hello.", "input": "", "output": "Hello!"}
    return [
        twice,
        twice,
        {"instruction": "This answer is empty.", "input": "", "output": ""},
        {"instruction": "This answer is missing."},
        {"instruction": "This answer is a number.", "input": "", "output": 42},
        "not a record",
    ]


def _lines(records: Iterable[object]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
