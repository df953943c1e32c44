"""A tokenizer of 97 words and texts made of them, for the models of conftest.py."""

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["[PAD]", *(f"w{number}" for number in range(1, 97))]


def word_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def documents(count: int = 300, seed: int = 0, words: list[str] = WORDS[1:]) -> list[str]:
    """Return texts of 20 to 60 words; the first words of the list are the most frequent."""
    generator = random.Random(seed)
    weights = [1 / (rank + 2) for rank in range(len(words))]
    return [" ".join(generator.choices(words, weights, k=generator.randint(20, 60))) for _ in range(count)]


def write_texts(folder: Path) -> Path:
    """Write a train and a test text, of different words, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(documents()))
    (folder / "test.txt").write_text("\n".join(documents(50, seed=1, words=WORDS[40:])))
    return folder
