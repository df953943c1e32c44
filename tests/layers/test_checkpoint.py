from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub import ModelCard

from flatllmcore import InputError
from flatllmcore.methods import METHODS
from flatllmcore.utils.checkpoint import MANIFEST, check_output_folder, model_card, put_in_place, stated_licence
from flatllmcore.utils.files import write_json
from sample_records import LLAMA_2_7B

RECORD = LLAMA_2_7B | {"method": "flatllm+", "shape": "per-layer", "input_divisor": 128, "rounded_to": None}
RECORD |= {"licence": {"license": "other", "license_name": "llama2", "license_link": "LICENSE"}}
WORDS = METHODS["flatllm+"].words(prune_qk=True)


def publish(folder: Path, *names: str) -> Path:
    """Write a folder as a run leaves it: files by the names given, and the manifest that lists them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    write_json(folder / MANIFEST, {"request": {}, "files": names})
    return folder


def link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("out/thesis.tex", Path.touch, "no run wrote .*/out/thesis.tex"),
        ("out/link", link, "no run wrote .*/out/link"),
        ("out.partial", link, "out.partial is in the way"),
        ("out.partial/.env", Path.touch, "out.partial is in the way"),
        ("out.partial/.tmp.0123456789abcdef", Path.mkdir, "out.partial is in the way"),
    ],
)
def test_overwriting_spares_what_no_run_wrote(tmp_path, name, make, reason):
    out = publish(tmp_path / "out", "config.json", "templates/chat.jinja")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(InputError, match=reason):
        check_output_folder(out, overwrite=True)


def test_overwriting_takes_what_a_run_wrote_in_whatever_state_a_kill_left_it(tmp_path):
    out = publish(tmp_path / "out", "config.json", "templates/chat.jinja")
    (publish(out / ".replaced") / "config.json").touch()  # a kill left the model before the last
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".tmp.0123456789abcdef").touch()
    check_output_folder(out, overwrite=True)
    with pytest.raises(InputError, match="not empty"):
        check_output_folder(out, overwrite=False)
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(out / "config.json", overwrite=True)


def test_a_model_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path):
    out = publish(tmp_path / "out", "weights")
    new = publish(tmp_path / "out.partial", "new")
    rename = Path.rename

    def refuse_the_new_one(path: Path, target: Path) -> Path:
        if path == new:
            raise PermissionError
        return rename(path, target)

    with mock.patch("pathlib.Path.rename", refuse_the_new_one), pytest.raises(PermissionError):
        put_in_place(new, out, overwrite=True)
    (out / "notes").touch()  # in the hours that the run took
    with pytest.raises(InputError, match="no run wrote"):
        put_in_place(new, out, overwrite=True)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "weights", MANIFEST, "notes", "out.partial", "new"}


def test_an_old_model_that_cannot_be_deleted_is_told_and_no_failure(tmp_path, monkeypatch, caplog):
    def refuse(_path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", "config.json")

    out, new = publish(tmp_path / "out", "old"), publish(tmp_path / "out.partial", "new")
    monkeypatch.setattr("shutil.rmtree", refuse)
    put_in_place(new, out, overwrite=True)
    assert (out / "new").exists()
    assert f"the new model is in {out}; the earlier one, in it, cannot be deleted: [Errno 1]" in caplog.text


def test_the_card_states_how_the_model_was_made():
    card = model_card(RECORD, WORDS)
    stated = ModelCard(card).data.to_dict()
    assert stated["library_name"] == "transformers"
    assert stated["base_model"] == "meta-llama/Llama-2-7b-hf"
    made = {"method": "flatllm+", "sparsity_ratio": 20}
    assert stated["flat_llm"] == {"base_model": "meta-llama/Llama-2-7b-hf"} | made
    assert "\n| perplexity (wikitext2, windows of 4096 tokens) | 5.114 | 6.735 |\n" in card
    assert "without training: rotary pairs of queries and keys, directions of values and channels of MLPs, " in card
    assert METHODS["flatllm"].words(prune_qk=False).startswith("value and output projections by head-wise PCA, MLPs")
    for fact in ("19.750 % achieved", "256 samples of 4096 tokens, seed 42", "torch 2.13.0", "3,210"):
        assert fact in card
    assert "trust_remote_code=True" in card
    assert "trust_remote_code" not in model_card(RECORD | {"shape": "stock"}, WORDS)
    assert stated["pipeline_tag"] == "text-generation"
    assert RECORD["licence"].items() <= stated.items()
    assert "NF4" not in card
    uneven = model_card(RECORD | {"input_divisor": 8}, WORDS)
    assert "multiples of 64 (but of 8), as groups of weights want.\n  bitsandbytes' NF4 is silently wrong" in uneven
    command = "python main.py --model meta-llama/Llama-2-7b-hf"
    assert f"`{command}`" in model_card(RECORD | {"command": command}, WORDS)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: 2024-04-18\n---\n", {"license": "other", "license_name": "2024-04-18"}),
        ("---\nlicense: [mit, 2024]\nlicense_name: 1\n---\n", {"license": "mit, 2024", "license_name": "1"}),
        *((f"---\n{front}\n---\n", {}) for front in ("a: &a [x, x]\nlicense: [*a, *a]", "license: []", "license: yes")),
        (
            f"---\nlicense: &a {'x' * 99}\nlicense_link: [{'*a, ' * 999}]\n---\n",
            {"license": "x" * 99, "license_link": ", ".join(9 * ["x" * 99])},
        ),
        ("# A model of nobody\n", {}),
    ],
)
def test_the_licence_is_the_one_that_the_base_model_s_card_states(tmp_path, text, stated):
    (tmp_path / "README.md").write_text(text)
    assert stated_licence(tmp_path / "README.md") == stated


@pytest.mark.parametrize("content", [b"---\nlicense: [\n---\n", b"\xff"])
def test_a_base_model_s_card_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(InputError, match=r"README.md cannot be read .* mend it"):
        stated_licence(tmp_path / "README.md")
