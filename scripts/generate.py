"""Let models, dense or compressed, finish a sentence or answer: greedily, so that their texts compare.

python scripts/generate.py models/pydocs-llama demo/pydocs-llama-20 --prompt "This function returns"
python scripts/generate.py out/smollm2/*-20 --chat --prompt "Why is the sky blue?"
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from flatllmbench.logs import keep_bars_to_terminals
from flatllmcore.errors import door, run_program
from flatllmcore.utils.devices import best_device
from flatllmcore.utils.loading import load_model, load_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per model; return the exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    keep_bars_to_terminals()
    logging.set_verbosity_error()
    return run_program(lambda: say_all(args))


def say_all(args: argparse.Namespace) -> None:
    """Print what each model says."""
    for name in args.models:
        tokenizer = load_tokenizer(name)
        model = load_model(name).to(best_device())
        say = answer if args.chat else finished_sentence
        with door(f"{name!r} cannot go on", "accepted: text, a sound generation_config.json, at least one new token"):
            said = say(model, tokenizer, args.prompt, args.max_new_tokens)
        print(f"{name}: {said}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="local folders or hub ids")
    parser.add_argument("--prompt", required=True, help="the sentence's beginning, or what is asked")
    parser.add_argument("--chat", action="store_true", help="have chat models answer, by their tokenizer's template")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="at most (default: %(default)s)")
    return parser.parse_args(argv)


def finished_sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> str:
    """Return the prompt and its most likely continuation, on one line, up to the end of a sentence or the limit."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    text = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    end = text.find(". ", len(prompt))
    return text if end < 0 else text[: end + 1]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Return what a chat model most likely answers, on one line, up to the limit."""
    with door(f"{tokenizer.name_or_path!r} cannot chat", "accepted with --chat: tokenizers with a chat template"):
        asked = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        ids = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=max_new_tokens)
    return " ".join(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(main())
