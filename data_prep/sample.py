"""A sample corpus to try the pipeline on: small, learnable, in English and Chinese, with every kind of bad record.

In: a directory. Out: ``instruction_tuning/*.json`` and ``pretraining/*.jsonl`` below it, the same bytes every time.
A tiny model learns it in a minute, because the answers follow from the questions. ~1 % of the records are broken on
purpose, so that the data report has something to explain. Cost: well under a second.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "white": "白色", "black": "黑色", "golden": "金色"}
ANIMALS = {"panda": "熊猫", "tiger": "老虎", "horse": "马", "rabbit": "兔子", "crane": "鹤", "carp": "鲤鱼"}
PLACES = {"forest": "森林", "river": "河边", "village": "村庄", "mountain": "山上", "garden": "花园"}
FOODS = {"bamboo": "竹子", "rice": "米饭", "apples": "苹果", "grass": "草", "cakes": "蛋糕"}


def write_sample(folder: Path, seed: int = 7) -> None:
    """Write the corpus below `folder`; a corpus that is there already stays as it is."""
    if folder.exists():
        return
    draw = random.Random(seed)
    english = [_english(draw) for _ in range(1500)]
    chinese = [_chinese(draw) for _ in range(900)]
    temporary = folder.with_name(folder.name + ".tmp")
    _write(temporary / "instruction_tuning" / "english.json", json.dumps([*english, *_bad()], indent=1))
    _write(temporary / "instruction_tuning" / "chinese.jsonl", _lines(chinese) + '{"input": "断了的记录", "target": \n')
    _write(temporary / "pretraining" / "stories.jsonl", _lines(_stories(draw)))
    temporary.rename(folder)


def _english(draw: random.Random) -> dict[str, str]:
    a, b = draw.randint(0, 60), draw.randint(0, 40)
    colour, animal = draw.choice(list(COLOURS)), draw.choice(list(ANIMALS))
    place, food = draw.choice(list(PLACES)), draw.choice(list(FOODS))
    return draw.choice(
        [
            {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"{a} plus {b} is {a + b}."},
            {
                "instruction": "Which animal is in the text, and where does it live?",
                "input": f"A {colour} {animal} lives near the {place} and eats {food}.",
                "output": f"It is a {animal}. It lives near the {place}.",
            },
            {
                "instruction": f"Describe the {colour} {animal} that eats {food} near the {place}.",
                "input": "",
                "output": f"The {animal} is {colour}. Every day it eats {food} near the {place}.",
            },
        ]
    )


def _chinese(draw: random.Random) -> dict[str, str]:
    colour, animal = draw.choice(list(COLOURS.values())), draw.choice(list(ANIMALS.values()))
    place, food = draw.choice(list(PLACES.values())), draw.choice(list(FOODS.values()))
    return {
        "input": f"{place}的{colour}{animal}吃什么？",
        "target": f"{place}的{animal}是{colour}的，它每天吃{food}。" if draw.random() < 0.5 else f"{animal}每天吃{food}。",
    }


def _stories(draw: random.Random) -> Iterator[dict[str, str]]:
    for number in range(400):
        animal, place, food = (draw.choice(list(words)) for words in (ANIMALS, PLACES, FOODS))
        days = " ".join(
            f"On day {day} the {animal} went to the {draw.choice(list(PLACES))} and ate {draw.choice(list(FOODS))}."
            for day in range(1, draw.randint(4, 14))
        )
        yield {
            "title": f"Story {number}: the {animal} of the {place}",
            "content": f"A {animal} lived in the {place}. It liked {food}. {days}",
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


def _lines(records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)  # type: ignore[attr-defined]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
