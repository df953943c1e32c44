"""Whatever a user's file or flag holds: the work is done, or one line says what is wrong and nothing is half done."""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import main
from conftest import tiny_model
from flatllmbench import report
from flatllmbench.command_line import FLAGS
from sample_records import COMPRESSION, EVALUATION, SCORING, TIMING
from tiny_text import WORDS, documents, word_tokenizer

pytestmark = pytest.mark.slow

CONFIG_KEYS = (
    *("dtype", "attn_implementation", "rope_scaling", "rope_theta", "quantization_config", "per_layer_config"),
    *("output_attentions", "output_hidden_states", "return_dict", "pad_token_id", "id2label", "layer_types"),
)
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
RECORDS = {"flatllm": COMPRESSION, "bi": SCORING, "zero_shot": EVALUATION, "speed": TIMING}
WORDS_OF_VALUES = (
    *("", "x", "10000", "\ud800", "$x^{", "float99", "torch.float32", "float8_e4m3fn", "int8"),
    *("flash_attention_2", "flex_attention", "eager", *ROPE_KINDS),
)
NUMBERS = (0, 1, -1, 3, 15, 300, 2**20, -(2**31), 10**30, 0.5, -0.5, 1e-308, 1e308)
VALUES = st.recursive(
    st.sampled_from([None, True, False, *WORDS_OF_VALUES, *NUMBERS]),
    lambda below: (
        st.lists(below, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "x"]), below, max_size=3)
    ),
    max_leaves=4,
)
FLAG_VALUES = (
    *("", "x", "text.txt", "~", "~/x", "~nobody9/x", "a\0b", "a\udcffb", "loop", "loop/x", "text.txt/x", "n" * 300),
    *("0", "1", "-1", "3", "300", f"{10**20}", "nan", "inf", "1e308", "cpu", "cuda:99999999999999999999", "auto"),
)
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "missing": lambda _: b"",
    "deep": lambda _: b"[" * 10**5,
    "not UTF-8": lambda content: b"\xff" + content,
    "cut": lambda content: content[: len(content) // 2],
    "no object": lambda _: b"null",
}


@pytest.fixture(scope="module")
def lent(tmp_path_factory):
    """Give the working folder: a fresh copy of one with a model, a text and a link to itself; the home is another."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model(num_hidden_layers=1, max_position_embeddings=16).float().save_pretrained(folder / "model")
    word_tokenizer(pad_token=WORDS[0]).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(documents(20)))
    (folder / "loop").symlink_to("loop")

    @contextlib.contextmanager
    def lend() -> Iterator[Path]:
        with TemporaryDirectory(dir=folder.parent) as place:
            shutil.copytree(folder, copy := Path(place, "here"), symlinks=True)
            with contextlib.chdir(copy):
                yield copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield lend


def is_done(program: Callable[[Sequence[str]], int], argv: Sequence[str]) -> bool:
    """Tell whether a program did its work; else it must have said in one line, or to argparse, why not."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = program(argv)
    except SystemExit as error:  # argparse, after the usage
        status = error.code
    text = said.getvalue()
    is_one_line = text.startswith("error: ") and text.count("\n") == 1
    assert status == 0 or (status == 2 and (is_one_line or text.startswith("usage: "))), text
    return status == 0


def is_compressed(*flags: str) -> bool:
    """Run ``main.py``; what it says that it did must be there whole."""
    asked = ["--model", "model", "--dataset", "text.txt", "--eval_dataset", "text.txt", "--device", "cpu"]
    asked += ["--nsamples", "2", "--seqlen", "8", "--save_model", "out", *flags]
    if not is_done(main.main, asked):
        assert not Path("out").exists()
        return False
    return True


def changed(content: Any, value: Any, choose: Callable[[list[Any]], Any]) -> Any:
    """Return JSON with one value in it, or one that is new, changed; ``choose`` picks it, one of a list at a time."""
    if not isinstance(content, dict | list) or not content or choose([False, False, False, True]):
        return value
    keys = [*content, *CONFIG_KEYS] if isinstance(content, dict) else list(range(len(content)))
    key, copy = choose(keys), content.copy()
    copy[key] = changed(content[key], value, choose) if isinstance(key, int) or key in content else value
    return copy


def has_many_layers(config: Any) -> bool:
    return isinstance(config, dict) and isinstance(n := config.get("num_hidden_layers"), int) and 300 < n < 10**30


@given(data=st.data())
def test_a_model_with_anything_in_its_files_is_compressed_or_refused_in_one_line(lent, data):
    with lent() as folder:
        names = ("config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        path = folder / "model" / data.draw(st.sampled_from(names))
        damage = data.draw(st.sampled_from([None, None, None, None, *DAMAGES]))
        if damage is not None:
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        else:
            choose = lambda choices: data.draw(st.sampled_from(choices))  # noqa: E731
            content = changed(json.loads(path.read_text()), data.draw(VALUES), choose)
            assume(not has_many_layers(content))
            path.write_text(json.dumps(content))
        if is_compressed():
            found = json.loads(Path("logs/model_flatllm_20.json").read_text())["perplexity"][0]
            assert all(math.isfinite(found[which]) for which in ("dense", "compressed"))


@given(flag=st.sampled_from([*FLAGS.values()]), value=st.sampled_from(FLAG_VALUES))
def test_any_flag_with_any_value_is_taken_or_refused_in_one_line(lent, flag, value):
    with lent() as folder:
        before = set(folder.iterdir())
        is_compressed(f"--{flag}={value}")
        assert not [path for path in set(folder.iterdir()) - before if path.name.startswith("~")]


@given(kind=st.sampled_from([*RECORDS]), value=VALUES, data=st.data())
def test_a_record_with_anything_in_it_makes_a_whole_page_or_none(lent, kind, value, data):
    with lent() as folder:
        record = changed(RECORDS[kind], value, lambda choices: data.draw(st.sampled_from(choices)))
        (folder / "record.json").write_text(json.dumps(record))
        made = is_done(report.main, ["record.json", "--out", "new"])
        assert made == Path("new/README.md").is_file()
        if made and "perplexity.png" in Path("new/README.md").read_text():
            assert Path("new/perplexity.png").is_file()
        assert made or not Path("new").exists()
