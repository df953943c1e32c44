"""llama.cpp, by the wheel xllamacpp: what it makes of a GGUF file."""

import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """llama.cpp's server with one model, in this process, on one thread."""

    def __init__(self, file: Path, length: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = length, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def ask(self, place: str, **asked: Any) -> dict[str, Any]:
        content = json.dumps(asked).encode()
        with urllib.request.urlopen(f"{self.server.listening_address}/{place}", content) as answer:
            return json.loads(answer.read())

    def greedy(self, prompt: Sequence[int], length: int) -> list[int]:
        """Return up to ``length`` tokens, the one that ends a text not among them."""
        asked = {"prompt": list(prompt), "n_predict": length, "temperature": 0, "return_tokens": True}
        return self.ask("completion", **asked)["tokens"]

    def perplexity(self, tokens: Sequence[int]) -> float:
        """Score each token but the first by the logits before it, where it is forced."""
        asked, total = {"n_predict": 1, "temperature": 0, "n_probs": 1}, 0.0
        for count, token in enumerate(tokens[1:], start=1):
            answer = self.ask("completion", prompt=tokens[:count], logit_bias=[[token, 1e4]], **asked)
            (score,) = answer["completion_probabilities"]
            assert score["id"] == token
            total -= score["logprob"]
        return math.exp(total / (len(tokens) - 1))

    def tokenize(self, text: str) -> list[int]:
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]
