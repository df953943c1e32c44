"""Questions for trying the evaluation harness without a network: which order of words is the text's own?

    python scripts/make_questions.py

writes tests/tasks/pydocs.jsonl: the beginning of a passage of held-out documentation, four endings, of which three
have two neighbouring words swapped, and which one has not. The text is the test split of `pydocs`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from flatllmcore.utils.text_sources import load_text

PLACE = Path(__file__).resolve().parents[1] / "tests" / "tasks" / "pydocs.jsonl"


def questions(documents: Sequence[str], count: int) -> Iterator[dict[str, object]]:
    """Yield a question on a paragraph of 24 to 48 words of each document that has one, until there are ``count``."""
    generator = random.Random(0)
    paragraphs = (
        next((p.split() for p in text.split("\n\n") if 24 <= len(p.split()) <= 48), None) for text in documents
    )
    for words in [paragraph for paragraph in paragraphs if paragraph][:count]:
        half = len(words) // 2
        ending = words[half:]
        places = [i for i in range(len(ending) - 1) if ending[i] != ending[i + 1]]
        choices = [ending, *(swapped(ending, place) for place in generator.sample(places, 3))]
        generator.shuffle(choices)
        yield {
            "beginning": " ".join(words[:half]),
            "endings": [" ".join(choice) for choice in choices],
            "label": choices.index(ending),
        }


def swapped(words: list[str], place: int) -> list[str]:
    return [*words[:place], words[place + 1], words[place], *words[place + 2 :]]


if __name__ == "__main__":
    lines = [json.dumps(question) for question in questions(load_text("pydocs", "test").documents, count=48)]
    PLACE.write_text("\n".join(lines) + "\n", encoding="utf-8")
