"""Perplexity and size on disk of models, dense or compressed, quantised on a CPU, saved and loaded again.

    python benchmarks/quantized.py models/pydocs-llama demo/pydocs-llama-20 --by quanto-int8 quanto-int4

Needs torchao, optimum-quanto and llmcompressor, which nothing else here does, the last with a transformers of its own
choice. GPTQ is calibrated on 16 windows of a train split. Arithmetic is float32: many a CPU has no
instructions for bfloat16. The head, and embeddings, stay in the type they had. docs/QUANTIZE.md has what came of it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TorchAoConfig
from transformers.utils.logging import set_verbosity_error

import flatllmcore  # noqa: F401 (makes compressed models known to transformers)
from common import write
from flatllmcore.errors import InputError, door
from flatllmcore.utils.data_utils import consecutive_windows, sample_documents
from flatllmcore.utils.loading import load_tokenizer
from flatllmcore.utils.text_sources import load_text

WAYS = ("bf16", "torchao-int8", "torchao-int4", "quanto-int8", "quanto-int4", "gptq-int4")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders")
    parser.add_argument("--by", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--dataset", default="pydocs", help="text, its test split (default: %(default)s)")
    parser.add_argument("--calibration", help="text for GPTQ, its train split (default: that of --dataset)")
    parser.add_argument("--windows", type=int, default=16, help="of 256 tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    args = parser.parse_args(argv)
    set_verbosity_error()
    calibration, rows = args.calibration or args.dataset, []
    for model in args.models:
        tokenizer = load_tokenizer(model)
        windows = consecutive_windows(load_text(args.dataset, "test"), tokenizer, 256, args.windows)
        for way in args.by:
            found = measured(model, way, windows, calibration)
            print(f"| {Path(model).name} | {way} | {found} |", flush=True)
            rows.append({"model": Path(model).name, "way": way, "megabytes | perplexity": found})
            write(args, torch.device("cpu"), {"rows": rows})


def measured(folder: str, way: str, windows: Tensor, calibration: str) -> str:
    """Return megabytes on disk and perplexity of the model loaded again, or what a library said against it."""
    try:
        with TemporaryDirectory() as saved, door("no", "see docs/QUANTIZE.md"):
            if way.startswith("quanto"):
                model = saved_by_quanto(folder, way, saved)
            elif way.startswith("gptq"):
                model = saved_by_gptq(folder, saved, calibration)
            else:
                model = saved_by_transformers(folder, way, saved)
            size = sum(path.stat().st_size for path in Path(saved).glob("*.safetensors")) / 1e6
            return f"{size:.1f} | {perplexity(model, windows):.2f}"
    except InputError as error:
        return str(error)


def saved_by_transformers(folder: str, way: str, saved: str) -> PreTrainedModel:
    """Return the model loaded again, in bf16 or by torchao; its int4, in groups of 32, is not packed on a CPU."""
    how = {}
    if way != "bf16":
        from torchao import quantization as by

        int4 = by.IntxWeightOnlyConfig(torch.int4, by.PerGroup(32))
        how["quantization_config"] = TorchAoConfig(int4 if way.endswith("int4") else by.Int8WeightOnlyConfig())
    dtype = torch.float32 if how else torch.bfloat16
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).save_pretrained(saved)
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)


def saved_by_quanto(folder: str, way: str, saved: str) -> PreTrainedModel:
    """Return the model loaded again by quanto's own functions: transformers does not save what quanto quantised."""
    from optimum import quanto

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quanto.quantize(model, weights=quanto.qint8 if way.endswith("int8") else quanto.qint4, exclude="lm_head")
    quanto.freeze(model)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, Path(saved) / "model.safetensors")
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    quanto.requantize(empty, load_file(Path(saved) / "model.safetensors"), quanto.quantization_map(model))
    empty.tie_weights()
    return empty


def saved_by_gptq(folder: str, saved: str, text: str) -> PreTrainedModel:
    """Return the model loaded again, in int4 by groups of 32, packed, by llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    calibration = sample_documents(load_text(text, "train"), load_tokenizer(folder), 16, 256, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    int4 = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32, symmetric=True))
    count, seqlen = calibration.shape
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": calibration.tolist()}),
        recipe=GPTQModifier(config_groups={"int4": int4}, ignore=["lm_head"]),
        num_calibration_samples=count,
        max_seq_length=seqlen,
    )
    model.save_pretrained(saved, save_compressed=True)
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)


@torch.no_grad()  # quanto unpacks int4 in ways that inference mode refuses
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    return torch.stack([model(ids[None], labels=ids[None]).loss.double() for ids in windows]).mean().exp().item()


if __name__ == "__main__":
    sys.exit(main())
