"""The JSON record of a run."""

import json
import platform
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import transformers

from flatllmbench import records
from flatllmbench.records import hardware, versions, write_record


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["python"] == platform.python_version()


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    def version(package: str) -> str:
        if package == "datasets":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(records, "version", version)
    assert "datasets" not in versions()
    assert versions()["torch"] == "1.0"


def test_the_hardware_names_the_device_and_the_threads_used():
    found = hardware(torch.device("cpu"))
    assert found["device"].endswith(f"CPU, {torch.get_num_threads()} threads")
    assert found["machine"] == platform.machine()


def test_a_record_is_read_back_as_it_was_and_makes_its_folder(tmp_path):
    record = {"layers": [{"layer": 0, "keep": 0.1 + 0.2}], "perplexity": None, "text": "wörter"}
    write_record(tmp_path / "new" / "run.json", record)
    assert json.loads((tmp_path / "new" / "run.json").read_text()) == record


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    write_record(tmp_path / "run.json", {"run": 1})
    with pytest.raises(TypeError):
        write_record(tmp_path / "run.json", {"run": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
