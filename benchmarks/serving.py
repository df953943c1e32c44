"""A compressed model in the programs that run it: texts, perplexity, size, cache and speed beside the dense model's.

    python benchmarks/serving.py models/pydocs-llama out/pydocs-llama-20
    python benchmarks/serving.py models/SmolLM2-135M-Instruct out/SmolLM2-135M-Instruct-20 --dataset wikitext2

The second folder came of the first. Both are run in float32 by transformers, in the same way without this package, by
the attention of servers (served_attention.py) and by llama.cpp (llama_cpp.py): ten prompts of 16 tokens are continued
greedily by 20, and 128 tokens are scored. Tokens are held against those of transformers with the package, all else
against the dense model in the same program: prompts of 128 tokens and 32 more on one thread, the best of three in turn.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import DynamicCache

from common import write
from flatllmbench.speed import cache_argument
from flatllmbench.tables import markdown_table
from flatllmcore.errors import run_program
from flatllmcore.export import export_gguf
from flatllmcore.utils.data_utils import consecutive_windows
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.text_sources import load_text
from llama_cpp import LlamaCpp
from served_attention import served_logits

PROMPTS, PROMPT_LENGTH, LENGTH, SCORED = 10, 16, 20, 128
RATIOS = ("cache, × dense", "prompt, × as fast", "decoding, × as fast")
WITHOUT_PACKAGE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "flatllmcore" not in sys.modules
prompts, scored, length = json.loads(sys.argv[2])
made = [model.generate(torch.tensor([p]), max_new_tokens=length, do_sample=False)[0, len(p):].tolist() for p in prompts]
with torch.no_grad():
    print(json.dumps([made, model(torch.tensor([scored]), labels=torch.tensor([scored])).loss.exp().item()]))
"""


class Served:
    """A model in float32, as a folder and as a GGUF file, with prompts and a text to score."""

    def __init__(self, name: str, place: Path, dataset: str) -> None:
        self.place, self.file, tokenizer = place, place / "model.gguf", load_tokenizer(name)
        self.model = load_model(name, dtype="float32").eval()
        self.model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        export_gguf(str(place), self.file)
        self.other = LlamaCpp(self.file, 512)
        windows = consecutive_windows(load_text(dataset, "test"), tokenizer, SCORED, PROMPTS + 1).tolist()
        self.prompts, self.scored = [window[:PROMPT_LENGTH] for window in windows[:PROMPTS]], windows[PROMPTS]
        self.eos = tokenizer.eos_token_id

    def with_package(self) -> tuple[list[list[int]], float]:
        """Return the continuations of the prompts and the perplexity of the text, by transformers."""
        how = {"max_new_tokens": LENGTH, "do_sample": False}
        made = [self.model.generate(torch.tensor([p]), **how)[0, len(p) :].tolist() for p in self.prompts]
        return made, self._perplexity(self.model(torch.tensor([self.scored])).logits)

    def without_package(self) -> tuple[list[list[int]], float]:
        """The same in a process where the package cannot be imported: its -I hides PYTHONPATH."""
        given = json.dumps([self.prompts, self.scored, LENGTH])
        command = [sys.executable, "-I", "-c", WITHOUT_PACKAGE, str(self.place), given]
        return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    def served(self) -> tuple[list[list[int]], float]:
        """The same by the attention of servers, without a cache."""
        made = []
        for prompt in self.prompts:
            tokens = torch.tensor([prompt])
            for _ in range(LENGTH):
                tokens = torch.cat([tokens, served_logits(self.model, tokens)[:, -1:].argmax(-1)], dim=1)
            made.append(tokens[0, len(prompt) :].tolist())
        return made, self._perplexity(served_logits(self.model, torch.tensor([self.scored])))

    def in_llama_cpp(self) -> tuple[list[list[int]], float]:
        """The same by llama.cpp."""
        return [self.other.greedy(prompt, LENGTH) for prompt in self.prompts], self.other.perplexity(self.scored)

    def _perplexity(self, logits: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(self.scored[1:])).exp().item()

    def up_to_the_end(self, texts: list[list[int]]) -> list[list[int]]:
        """Return texts without what follows the token that ends one."""
        return [text[: text.index(self.eos)] if self.eos in text else text for text in texts]

    def cost_in_transformers(self) -> tuple[float, float, float]:
        """Return seconds for a prompt and for the tokens after it, and the cache's bytes."""
        cache = DynamicCache(config=self.model.config)
        by_name, started = cache_argument(self.model, cache), time.perf_counter()
        token = self.model(torch.tensor([self.scored]), **by_name).logits[:, -1:].argmax(-1)
        prompted = time.perf_counter()
        for _ in range(32):
            token = self.model(token, **by_name).logits.argmax(-1)
        size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        return prompted - started, time.perf_counter() - prompted, size

    def cost_in_llama_cpp(self) -> tuple[float, float, float]:
        """The same; the cache has the widths that the file states."""
        asked = {"prompt": self.scored, "n_predict": 32, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        timings, config = self.other.ask("completion", **asked)["timings"], self.model.config
        size = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return timings["prompt_ms"], timings["predicted_ms"], size


@torch.no_grad()
def compare(dense: Served, small: Served) -> list[dict[str, object]]:
    """Return what both models do in each program, a row each."""
    programs = {
        "transformers, with flatllmcore": (Served.with_package, Served.cost_in_transformers),
        "transformers, `trust_remote_code`": (Served.without_package, None),
        "attention of vLLM, SGLang, TGI": (Served.served, None),
        "llama.cpp": (Served.in_llama_cpp, Served.cost_in_llama_cpp),
    }
    expected = small.up_to_the_end(small.with_package()[0])
    rows: list[dict[str, object]] = []
    for program, (run, cost) in programs.items():
        (made, perplexity), (_, before) = run(small), run(dense)
        same = sum(a == b for a, b in zip(small.up_to_the_end(made), expected, strict=True))
        rows.append({"program": program, f"same {LENGTH} tokens": f"{same} of {PROMPTS}"})
        rows[-1] |= {"perplexity": perplexity, "dense": before} | dict.fromkeys(RATIOS, "not run")
        if cost is not None:
            timed = [[cost(dense), cost(small)] for _ in range(3)]
            of_dense, of_small = (list(map(min, zip(*(pair[i] for pair in timed), strict=True))) for i in (0, 1))
            prompt, decoding = (a / b for a, b in zip(of_dense[:2], of_small[:2], strict=True))
            rows[-1] |= zip(RATIOS, (of_small[2] / of_dense[2], prompt, decoding), strict=True)
    return rows


def shown(cell: object) -> str:
    """Return a cell of the table."""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("dense", help="the dense model")
    parser.add_argument("compressed", help="what came of it")
    parser.add_argument("--dataset", default="pydocs", help="text whose test split is prompt and score")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    args = parser.parse_args(argv)

    def work() -> None:
        torch.set_num_threads(1)
        with TemporaryDirectory() as place:
            names = {"dense": args.dense, "small": args.compressed}
            models = [Served(name, Path(place, kind), args.dataset) for kind, name in names.items()]
            rows, sizes = compare(*models), [model.file.stat().st_size / 1e6 for model in models]
        print(markdown_table(rows[0], [[shown(cell) for cell in row.values()] for row in rows]), end="")
        print(f"GGUF: {sizes[1]:.1f} MB, dense {sizes[0]:.1f} MB.")
        write(args, torch.device("cpu"), {"programs": rows, "gguf_mb": dict(zip(names, sizes, strict=True))})

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
