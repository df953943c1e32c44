"""Peak memory of a run out of core, measured on a process that only had its imports before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flatllmbench.costs import solve_memory_bytes
from flatllmbench.random_checkpoint import write_random_checkpoint
from transformers import LlamaConfig

from flatllmcore.utils.layer_utils import dimensions_from_config, load_config
from python_process import LIBRARY
from test_main import character_tokenizer, save_text

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN = 64, 1024
LAYER_BYTES = 2 * 7 * HIDDEN**2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    write_random_checkpoint(
        config,
        folder / "dense",
        dtype=torch.bfloat16,
        max_shard_bytes=10 * LAYER_BYTES,
        seed=0,
        tokenizer_from=folder / "tokenizer",
    )
    save_text(folder / "text")
    return folder


# What the run adds to the imports: its resident memory before, and the peak after.
PROGRAM = """
import re, sys
from pathlib import Path
import main
def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
status = main.main(sys.argv[1:])
Path("growth").write_text(str(memory("VmHWM") - before))
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell peak memory")
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(folder):
    """Three layers (at work, being read, and mapped while it is read), a solve, and what libraries take.

    All of it together is less than a quarter of the model, which is read four times and written once. The C library
    keeps freed tensors of less than 32 MB for later, which these are and those of a large model are not: it is told
    not to.
    """
    argv = [
        *("--model", "dense", "--dataset", "text", "--sparsity_ratio", "20", "--seqlen", "64", "--device", "cpu"),
        *("--nsamples", "4", "--save_model", "out", "--out_of_core"),
    ]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "PYTHONPATH": f"{LIBRARY}:{ROOT}"}
    command = [sys.executable, "-c", PROGRAM, *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    growth = int((folder / "growth").read_text())
    dimensions = dimensions_from_config(load_config(str(folder / "dense")))
    solve_bytes = solve_memory_bytes(dimensions, (HIDDEN // 8, HIDDEN))
    assert growth < 3 * LAYER_BYTES + solve_bytes + 100 * 2**20
    assert growth < LAYERS * LAYER_BYTES / 4
