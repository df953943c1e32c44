"""The library in one page: load a model, compress it, save it, load it again, and let it write.

    python scripts/quick_start.py                        # the embedded model: 45 seconds of one core
    python scripts/quick_start.py /models/Llama-2-7b-hf  # any local folder

Calibration text is the one that lies beside the embedded model, so nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flatllmcore import FlatLLMConfig, FlatLLMReassembler
from flatllmcore.errors import run_program
from flatllmcore.utils import check_sparsity
from flatllmcore.utils.loading import load_model, load_tokenizer

EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "models" / "pydocs-llama"
PROMPT = "If the file does not exist,"


def main(argv: Sequence[str] | None = None) -> int:
    folder = parse_arguments(argv).model
    return run_program(lambda: compress(folder))


def compress(folder: Path) -> None:
    """Compress the model in a folder, save and reload it, and print sizes and text; InputError if it is unusable."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    parameters_before = model.num_parameters()

    config = FlatLLMConfig(
        target_sparsity=0.2,  # a fifth of the decoder layers' linear weights is removed
        cal_dataset=EMBEDDED_MODEL / "text",
        cal_nsamples=64,
        seqlen=256,
    )
    compressed_model = FlatLLMReassembler.reassemble(model, tokenizer, config)
    print(f"Parameters: {parameters_before} before, {compressed_model.num_parameters()} after")
    print(f"Removed from the decoder layers: {check_sparsity(compressed_model):.1%}")

    with TemporaryDirectory() as saved:
        compressed_model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        reloaded = AutoModelForCausalLM.from_pretrained(saved)
        print(f"Reloaded: {type(reloaded).__name__}, {reloaded.num_parameters()} parameters")
        print(continued(PROMPT, reloaded, AutoTokenizer.from_pretrained(saved)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EMBEDDED_MODEL, help="local folder of a dense model")
    args = parser.parse_args(argv)
    if not args.model.is_dir():
        parser.error(f"{args.model} is not a folder; give one that save_pretrained has written")
    return args


def continued(prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt and its most likely continuation, on one line."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(main())
