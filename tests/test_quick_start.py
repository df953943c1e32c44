"""The quick start, from another folder; the gate runs it as a reader would, with all of its calibration data."""

import json
import re
import runpy

import pytest
from safetensors import safe_open

from conftest import ROOT
from flatllmcore import FlatLLMConfig

EMBEDDED = ROOT / "models" / "pydocs-llama"
PROMPT = "If the file does not exist,"


MAIN = runpy.run_path(str(ROOT / "scripts" / "quick_start.py"))["main"]


def test_it_compresses_saves_reloads_and_writes(tmp_path, monkeypatch, capsys):
    few = {"cal_nsamples": 12, "cal_dataset": next((EMBEDDED / "text").glob("test*"))}
    monkeypatch.setitem(MAIN.__globals__, "FlatLLMConfig", lambda **options: FlatLLMConfig(**options | few))
    monkeypatch.chdir(tmp_path)
    MAIN([])
    sizes, removed, reloaded, text = capsys.readouterr().out.splitlines()
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


def test_what_is_no_folder_is_refused(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        MAIN(["nowhere"])
    out, error = capsys.readouterr()
    assert out == ""
    assert error.splitlines()[-1].endswith("error: nowhere is not a folder; give one that save_pretrained has written")


def test_code_of_a_folder_is_not_run_nor_asked_for(tmp_path, capsys):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foo", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    assert MAIN([str(tmp_path)]) == 2
    assert re.fullmatch("error: no usable model config at .*\n", capsys.readouterr().err)
