"""Peak memory of a run out of core, measured on a process that only had its imports before."""

import pytest
import torch
from transformers import LlamaConfig

from python_process import LIBRARY, run_python_anew
from random_checkpoint import write_random_checkpoint
from tiny_text import WORDS, documents, word_tokenizer

LAYERS, HIDDEN = 24, 768
LAYER_BYTES = 4 * 7 * HIDDEN**2
SOLVE_BYTES = 8 * (4 * HIDDEN**2 + HIDDEN * 256)  # the MLP's moment and at most three matrices as large, and a strip

# What the run adds to the imports: its resident memory before, and the peak after.
PROGRAM = """
import re
from pathlib import Path
import main
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
assert main.main(FLAGS) == 0
Path("growth").write_text(str(memory("VmHWM") - before))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(tmp_path, monkeypatch):
    """Three layers (at work, being read, and mapped while it is read), a solve, and what libraries take.

    All of it together is less than half of the model, which is read four times and written once. The C library
    keeps freed tensors of less than 32 MB for later, which these are and those of a large model are not: it is told
    not to.
    """
    sizes = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    write_random_checkpoint(config, tmp_path / "dense", torch.float32, max_shard_bytes=10 * LAYER_BYTES)
    word_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(documents(2)))
    flags = ["--model", "dense", "--dataset", "text.txt", "--eval_dataset", "text.txt", "--sparsity_ratio", "20"]
    flags += ["--seqlen", "16", "--nsamples", "2", "--device", "cpu", "--save_model", "out", "--out_of_core"]
    monkeypatch.chdir(tmp_path)
    paths = (LIBRARY, LIBRARY.parent)
    run_python_anew(PROGRAM.replace("FLAGS", str(flags)), paths, MALLOC_MMAP_THRESHOLD_=str(2**20))
    growth = int((tmp_path / "growth").read_text())
    assert growth < 3 * LAYER_BYTES + SOLVE_BYTES + 100 * 2**20
    assert growth < LAYERS * LAYER_BYTES / 2
