"""The quick start, run as a reader would run it, from another folder and without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "models" / "pydocs-llama"
PROMPT = "If the file does not exist,"


def quick_start(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "quick_start.py"), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_it_compresses_saves_reloads_and_writes(tmp_path):
    done = quick_start(tmp_path)
    assert done.returncode == 0, done.stderr
    sizes, removed, reloaded, text = done.stdout.splitlines()
    before, after = map(int, re.fullmatch(r"Parameters: (\d+) before, (\d+) after", sizes).groups())
    with safe_open(EMBEDDED / "model.safetensors", "pt") as file:
        assert before == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  not a dict
    # A fifth of the decoder layers' linear weights, and nothing else.
    assert float(re.fullmatch(r"Removed from the decoder layers: (.+)%", removed)[1]) == pytest.approx(20.3, abs=0.4)
    assert before - after == pytest.approx(0.203 * 2_850_816, rel=0.02)
    assert reloaded == f"Reloaded: FlatLlamaForCausalLM, {after} parameters"
    assert text.startswith(PROMPT)
    assert len(re.findall(r"[a-z]{2,}", text.removeprefix(PROMPT))) >= 5
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_is_refused(tmp_path):
    done = quick_start(tmp_path, "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(
        "error: nowhere is not a folder; give one that save_pretrained has written"
    )
