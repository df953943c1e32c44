import contextlib
import gzip
import json
import lzma
import os
from codecs import BOM_UTF8
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from checkpoints import hub_cache
from flatllmcore.errors import InputError
from flatllmcore.utils import data_utils, text_sources
from flatllmcore.utils.data_utils import consecutive_windows, read_calibration_data, sample_documents, sample_mixture
from flatllmcore.utils.names import public_text, text_names
from flatllmcore.utils.text_sources import TextDataset, has_test_split, load_text
from python_process import run_python
from tiny_text import word_tokenizer

BOS = 0
DAMAGED = "; accepted: .txt"
CHARACTERS = "\n " + "".join(chr(code) for code in range(0x4E00, 0x4E00 + 400))
IDS = {character: number + 1 for number, character in enumerate(CHARACTERS)}


def _character_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": BOS} | IDS, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8)


TOKENIZER = _character_tokenizer()
TALKING = word_tokenizer()
TALKING.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def plain_ids(text: str) -> list[int]:
    return [IDS[character] for character in text]


def text_of(*lengths: int, separator: str = "\n\n") -> TextDataset:
    """Return documents of the given lengths, no character of which occurs twice."""
    letters = iter(CHARACTERS[2:])
    return TextDataset("x", "train", ["".join(next(letters) for _ in range(length)) for length in lengths], separator)


texts = st.builds(
    lambda lengths, separator: text_of(*lengths, separator=separator),
    st.lists(st.integers(0, 12), min_size=1, max_size=14),
    st.sampled_from(["\n", "\n\n"]),
)


def states_after(state: tuple, window: list[int], seqlen: int) -> set[tuple]:
    """Return every way to take the window off the documents left: (can start, ids) each."""
    states = set()
    for start in (i for i, (can_start, _) in enumerate(state) if can_start):
        order = [*range(start, len(state)), *range(start)]
        if [token for i in order for token in state[i][1]][:seqlen] == window:
            missing, left = seqlen, dict(enumerate(state))
            for i in order:
                can_start, ids = left[i]
                left[i] = (can_start, ids[missing:])
                missing = max(0, missing - len(ids))
                if missing == 0:
                    break
            states.add(tuple(left[i] for i in range(len(state)) if left[i][1]))
    return states


class TestSampleDocuments:
    @given(texts, st.integers(2, 9), st.integers(0, 2**31))
    def test_every_window_is_the_front_of_the_concatenated_documents_left(self, text, seqlen, seed):
        """Oracle: lists of ids, from which each window is taken off and the rest put back."""
        ids = [(bool(d), tuple(plain_ids(d + text.separator))) for d in text.documents]
        nsamples = sum(len(tokens) for _, tokens in ids) // seqlen
        try:
            windows = sample_documents(text, TOKENIZER, nsamples, seqlen, seed)
        except InputError:  # only blank documents are left, and none of them can start a window
            assert not all(text.documents)
            return
        with pytest.raises(InputError, match=f"asked {nsamples + 1} windows .* gives at most {nsamples};"):
            sample_documents(text, TOKENIZER, nsamples + 1, seqlen, seed)
        states = {tuple(ids)}
        for window in windows.tolist():
            assert len(window) == seqlen
            states = {after for state in states for after in states_after(state, window, seqlen)}
            assert states

    def test_a_blank_document_starts_no_window(self):
        text = TextDataset("x", "train", ["", CHARACTERS[2:6], "", " ", CHARACTERS[6:9], ""], "\n")
        starts = {sample_documents(text, TOKENIZER, 1, 4, seed)[0, 0].item() for seed in range(40)}
        assert starts == {IDS[CHARACTERS[2]], IDS[CHARACTERS[6]]}

    def test_a_document_is_tokenised_once_and_only_when_needed(self):
        seen = []

        def recording_tokenizer(text, **options):
            seen.append(text)
            return TOKENIZER(text, **options)

        recording_tokenizer.name_or_path = "tokenizer"
        text = text_of(*[30] * 12)
        sample_documents(text, recording_tokenizer, 8, 10, seed=0)
        assert len(seen) == len(set(seen)) < 12


class TestMixtures:
    @pytest.mark.parametrize(
        ("names", "nsamples", "shares"),
        [
            ("a", 4, {"a": 4}),
            ("ab", 4, {"a": 2, "b": 2}),
            ("abc", 8, {"a": 3, "b": 3, "c": 2}),
            ("aba", 3, {"a": 2, "b": 1}),
        ],
    )
    def test_shares_are_equal_and_each_is_what_its_text_gives_alone(self, names, nsamples, shares):
        """Oracle: windows sampled from each text by itself; one named twice gives two shares and no window twice."""
        texts = {name: replace(text_of(*[9 + place] * 8), name=name) for place, name in enumerate("abc")}
        alone = [sample_documents(texts[name], TOKENIZER, share, 5, 7) for name, share in shares.items()]
        mixed = sample_mixture([texts[name] for name in names], TOKENIZER, nsamples, 5, 7)
        assert torch.equal(mixed, torch.cat(alone))

    def test_names_are_joined_by_a_plus_unless_there_is_such_a_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a+b").mkdir()
        assert text_names("wikitext2+a+b") == ["wikitext2", "a", "b"]
        assert text_names("a+b") == [public_text(f"{tmp_path}/a+b")] == ["a+b"]
        assert public_text(f"{tmp_path}+some/text") == f"{tmp_path.name}+some/text"
        monkeypatch.setenv("HOME", str(tmp_path))
        Path("secret").mkdir()
        assert public_text("wikitext2+~/secret+~") == f"wikitext2+secret+{tmp_path.name}"


def test_the_same_seed_gives_the_same_windows_and_leaves_the_global_state():
    text = text_of(*[8] * 30)
    before = torch.get_rng_state()
    first, again, other = (sample_documents(text, TOKENIZER, 6, 16, seed) for seed in (42, 42, 43))
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert torch.equal(first[:2], sample_documents(text, TOKENIZER, 2, 16, 42))
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


class TestConsecutiveWindows:
    @given(texts, st.integers(1, 9))
    def test_windows_are_the_text_with_one_bos_cut_in_order(self, text, seqlen):
        joined = [BOS, *plain_ids(text.separator.join(text.documents))]
        count = len(joined) // seqlen
        if count == 0:
            with pytest.raises(InputError, match=f"has {len(joined)} tokens, fewer than one window of {seqlen}"):
                consecutive_windows(text, TOKENIZER, seqlen)
            return
        windows = consecutive_windows(text, TOKENIZER, seqlen)
        assert windows.dtype == torch.int64
        assert windows.shape == (count, seqlen)
        assert windows.flatten().tolist() == joined[: count * seqlen]

    @pytest.mark.parametrize(("template", "first"), [("<s> $A <s>", [BOS]), ("$A <s>", [])])
    def test_what_a_tokenizer_puts_behind_a_text_is_left_out(self, template, first):
        tokenizer = _character_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS)]
        )
        windows = consecutive_windows(text_of(9), tokenizer, 1)
        assert windows.flatten().tolist() == first + TOKENIZER(text_of(9).documents[0])["input_ids"][1:]

    def test_a_text_longer_than_the_model_takes_gives_no_warning(self, caplog, recwarn):
        consecutive_windows(text_of(100), _character_tokenizer(), 5)
        assert not caplog.records
        assert not recwarn.list

    @given(texts, st.integers(1, 40))
    def test_a_very_long_text_is_tokenised_in_pieces_that_join_to_it(self, text, piece_characters):
        with pytest.MonkeyPatch.context() as patch:
            whole = consecutive_windows(text, TOKENIZER, 1)
            patch.setattr(data_utils, "_PIECE_CHARACTERS", piece_characters)
            pieces = list(data_utils._pieces(text))
            assert "".join(pieces) == text.separator.join(text.documents)
            assert torch.equal(consecutive_windows(text, TOKENIZER, 1), whole)
            assert torch.equal(consecutive_windows(text, TOKENIZER, 1, 3), whole[:3])

    def test_a_very_long_document_is_tokenised_by_its_lines(self, monkeypatch):
        document, words, read = "w1 w2\nw3 w4 w5\n\nw6\n" + "w7 " * 9, word_tokenizer(), []
        whole = words(document, add_special_tokens=False)["input_ids"]
        monkeypatch.setattr(data_utils, "_LONGEST_PIECE", 9)  # a third of the last line, which has no end
        watched = Mock(side_effect=lambda piece, **how: read.append(piece) or words(piece, **how), name_or_path="")
        assert data_utils._encode(watched, document) == whole
        assert "".join(read) == document
        assert read[:3] == ["w1 w2\n", "w3 w4 w5\n", "\nw6\n"]

    def test_what_is_behind_the_windows_asked_for_is_not_tokenised(self, monkeypatch):
        """Pieces are documents here; BOS and the three tokens of the first are enough."""
        monkeypatch.setattr(data_utils, "_PIECE_CHARACTERS", 1)
        text = TextDataset("text", "test", ["w1 w2 w3", "w4", "w5"], " ")
        read = []
        monkeypatch.setattr(
            data_utils, "_encode", lambda _, piece, **__: read.append(piece) or [0] * len(piece.split())
        )
        assert consecutive_windows(text, TOKENIZER, 2, 2).shape == (2, 2)
        assert read == ["w1 w2 w3 "]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class TestPaths:
    @given(st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda text: text[:1] != "\ufeff"))
    def test_a_text_file_joins_back_exactly(self, tmp_path_factory, content):
        """Also behind a byte-order mark."""
        path = tmp_path_factory.mktemp("text") / "some.txt"
        for mark in (BOM_UTF8, b""):
            path.write_bytes(mark + content.encode())
            text = load_text(str(path), "train")
            assert text.separator.join(text.documents) == content
        assert load_text(str(path), "test").documents == text.documents
        assert not has_test_split(str(path))

    @pytest.mark.parametrize(
        "name", ["a.json", "a[1]*.jsonl", "a.json.gz", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.parquet"]
    )
    def test_each_kind_of_file_gives_its_records(self, tmp_path, name):
        rows = [{"text": "one\ntwo\r", "url": "u"}, {"text": "", "url": "v"}, {"text": "ü\x85", "url": "w"}]
        path = tmp_path / name
        if name.endswith("parquet"):
            Dataset.from_list(rows).to_parquet(path)
        elif name.endswith("csv"):  # as spreadsheets write it
            cells = [f'"{row["text"]}",{row["url"]}' for row in rows]
            path.write_bytes("\r\n".join(["\ufefftext,url", *cells, ""]).encode())
        else:
            content = "\n".join(map(json.dumps, rows)) + "\n" if "jsonl" in name else json.dumps(rows, indent=1)
            pack = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
            path.write_bytes(pack(content.encode()))
        text = load_text(str(path), "train")
        assert text == TextDataset(str(path), "train", ["one\ntwo\r", "", "ü\x85"], "\n\n")

    def test_instructions_become_alpaca_prompts(self, tmp_path):
        """The expected texts are the rows 0 and 5 of the published dataset, shortened."""
        rows = [
            {"instruction": "Give three tips.", "input": "", "output": "1.Eat"},
            {"instruction": "Identify it.", "input": "Twitter, Instagram", "output": "Telegram"},
        ]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        assert load_text(str(tmp_path / "a.json"), "train").documents == [
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nGive three tips.\n\n### Response:\n1.Eat",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nIdentify it.\n\n"
            "### Input:\nTwitter, Instagram\n\n### Response:\nTelegram",
        ]

    def test_conversations_become_what_the_chat_template_makes_of_them(self, tmp_path):
        """In a file, of which a record may have a text as well, and in the library."""
        shared = [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]  # as ShareGPT has them
        rows = [
            {"messages": TURNS},
            {"text": "w3", "messages": TURNS},
            {"messages": TURNS[:1]},
            {"conversations": shared},
        ]
        expected = ["<user>w1<assistant>w2", "w3", "<user>w1", "<user>w1<assistant>w2"]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert load_text(str(tmp_path / "a.jsonl"), "train", tokenizer=TALKING).documents == expected
        assert read_calibration_data(rows, 9, (), TALKING).documents == expected

    def test_a_prompt_and_its_completion_are_one_text_or_one_conversation(self):
        rows = [{"prompt": "w1", "completion": " w2"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}]
        rows += [rows[0] | {"text": "w3"}, rows[0] | {"messages": TURNS[:1]}]
        rows += [{"messages": None, "text": None} | row for row in (rows[0], {"conversations": TURNS})]  # empty cells
        expected = ["w1 w2", "<user>w1<assistant>w2", "w3", "<user>w1", "w1 w2", "<user>w1<assistant>w2"]
        assert read_calibration_data(rows, 9, (), TALKING).documents == expected
        with pytest.raises(InputError, match=r"has prompt \(str\), completion \(list\); accepted: .* prompt and compl"):
            read_calibration_data([{"prompt": "w1", "completion": TURNS}], 9, (), TALKING)

    def test_a_table_s_cells_may_be_long(self, tmp_path):
        (tmp_path / "a.csv").write_text(f"id,prompt,completion\n1,{'a' * 200_000},b\n")
        assert load_text(str(tmp_path / "a.csv"), "train").documents == ["a" * 200_000 + "b"]

    @pytest.mark.parametrize(
        ("template", "messages", "message"),
        [
            (None, [{"role": "user", "content": "w1"}], "record 2 is a conversation; give a tokenizer that has a chat"),
            ("{{ messages[0].role }}", ["w1"], "record 2 does not fit the chat template .* accepted: messages with"),
            ("{{ raise_exception('no x') }}", TURNS, r"record 2 does not fit .*no x\); accepted"),
            ("{{ messages }}", "w1", r"record 2 has messages \(str\); accepted: text \(str\), messages"),
        ],
    )
    def test_a_conversation_that_cannot_be_rendered_is_one_line(self, tmp_path, template, messages, message):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = template
        rows = [{"text": "w2"}, {"messages": messages}]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for one in (tokenizer, *([] if template else [None])):
            with pytest.raises(InputError, match=message) as caught:
                load_text(str(tmp_path / "a.jsonl"), "train", tokenizer=one)
            assert "\n" not in str(caught.value)
            with pytest.raises(InputError, match=f"the calibration data, {message}"):
                read_calibration_data(rows, 9, (), one)

    def test_tables_are_read_some_rows_at_a_time(self, tmp_path, monkeypatch):
        """In a small file a dictionary may have one long text stand in every row."""
        Dataset.from_list([{"text": "x"}] * 3000).to_parquet(tmp_path / "a.parquet")
        read, sizes = parquet.ParquetFile.iter_batches, []
        counted = lambda *given: (sizes.append(len(batch)) or batch for batch in read(*given))  # noqa: E731
        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
        assert len(load_text(str(tmp_path / "a.parquet"), "train").documents) == sum(sizes) == 3000
        assert max(sizes) <= text_sources._ROWS

    @pytest.mark.parametrize(
        ("files", "train", "test"),
        [
            (["train.txt", "test.txt", "valid.txt"], ["train.txt"], ["test.txt"]),
            (["train-1.txt", "train-0.txt", "data/dev.txt"], ["train-0.txt", "train-1.txt"], ["data/dev.txt"]),
            (["en/c4-train.0.txt", "en/c4-validation.0.txt"], ["en/c4-train.0.txt"], ["en/c4-validation.0.txt"]),
            (["train/0.txt", "test/0.txt", "train/._0.txt", "train.md"], ["train/0.txt"], ["test/0.txt"]),
            (["latest.txt", "contest.txt"], ["contest.txt", "latest.txt"], None),
            (["valid.txt"], None, ["valid.txt"]),
        ],
    )
    def test_a_folder_has_the_splits_its_names_tell(self, tmp_path, files, train, test):
        for file in files:
            write(tmp_path / file, file.encode())
        found = {}
        for split in ("train", "test"):
            with contextlib.suppress(InputError):
                found[split] = load_text(str(tmp_path), split).documents
        assert found == {split: documents for split, documents in (("train", train), ("test", test)) if documents}
        assert has_test_split(str(tmp_path)) == (test is not None)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", b'{"title": "x", "b": 5}', r"record 1 has title \(str\), b \(int\); accepted: text \(str\)"),
            ("a.jsonl", b"", "a.jsonl is empty"),
            ("a.jsonl", b'{"text": "x"}\n[5]', r"record 2 has text \(int\); accepted"),
            ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"line 3: Expecting value\); accepted"),
            ("a.json", b'[\n{"text": "x"},\n{]', r"line 3: Expecting property name .*\); accepted"),
            ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12], DAMAGED),
            ("a.arrow", b"plain", DAMAGED),
            ("a.txt", b"x\n\xed\xa0\xbd", r"line 2: 'utf-8' codec .*\); accepted"),  # a surrogate is no UTF-8
            ("a.csv", b"text,url\nx,y,z", r"row 2 has more cells than the first\); accepted"),
            ("a.csv", b"text,text\nx,y", r"two columns have one name\); accepted"),
            ("a.csv", b'text\n"x', r"unexpected end of data\); accepted"),
            ("a.pdf", b"%PDF-1.7", DAMAGED),
        ],
    )
    def test_a_file_that_cannot_be_used_is_one_line(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_text(str(tmp_path / name), "train")
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("start", ["\n", "\r\n", "  \n\n", "\ufeff", ""])
    def test_blank_lines_and_missing_inputs_are_no_matter(self, tmp_path, start):
        """Oracle: the Alpaca prompt of the same record without input; a date and a number in quotes are texts."""
        records = ['{"text": "2020-01-01"}', " ", '{"instruction": "a", "input": null, "output": "b"}', '{"text": "5"}']
        (tmp_path / "a.jsonl").write_text(start + "\n".join(records), newline="")
        (tmp_path / "b.json").write_text(start + '{\n"instruction": "a",\n"output": "b"}', newline="")
        (prompt,) = load_text(str(tmp_path / "b.json"), "train").documents
        assert load_text(str(tmp_path / "a.jsonl"), "train").documents == ["2020-01-01", prompt, "5"]

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_lone_surrogates_become_one_character_that_is_counted(self, tmp_path, name, caplog):
        rows = [{"text": "x \ud83d y\udc00"}, {"text": "\ud83d\ude00 ü"}, {"text": "z"}]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows))
        assert load_text(str(tmp_path / name), "train").documents == ["x \ufffd y\ufffd", "\U0001f600 ü", "z"]
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / name}: lone surrogates in 1 documents are read as U+FFFD"
        ]

    def test_what_datasets_saved_to_disk_is_read(self, tmp_path):
        parts = {split: Dataset.from_dict({"text": [f"{split} {n}" for n in range(4)]}) for split in ("train", "test")}
        DatasetDict(parts).save_to_disk(tmp_path / "both", num_shards={"train": 2, "test": 1})
        parts["train"].save_to_disk(tmp_path / "one")
        (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(b"of a map")
        for split in ("train", "test"):
            assert load_text(str(tmp_path / "both"), split).documents == parts[split]["text"][:]
        assert has_test_split(str(tmp_path / "both"))
        assert load_text(str(tmp_path / "one"), "train").documents == parts["train"]["text"][:]
        assert not has_test_split(str(tmp_path / "one"))

    def test_links_are_followed_and_what_is_hidden_is_not(self, tmp_path):
        """Two folders that link to one another, one whose parts lie elsewhere, and a hidden one."""
        for file in ("elsewhere/0.txt", "elsewhere/1.txt", "a/train-2.txt", "a/.cache/train.txt"):
            write(tmp_path / file, file[-5:-4].encode())
        (tmp_path / "a" / "train").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "a" / "train-3.txt").symlink_to(tmp_path / "elsewhere" / "0.txt")
        (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
        files = text_sources._files_in(tmp_path / "a", "a", "train")
        found = [str(file.relative_to(tmp_path / "a")) for file in files]
        assert found == ["train/0.txt", "train/1.txt", "train-2.txt", "train-3.txt"]

    @pytest.mark.parametrize("path", ["pipe", "pipe.txt", "folder/pipe.txt", "folder/broken.txt"])
    def test_what_is_no_ordinary_file_is_refused_unopened(self, tmp_path, path):
        write(tmp_path / "folder" / "train.txt", b"x")
        (tmp_path / path).symlink_to("nowhere") if "broken" in path else os.mkfifo(tmp_path / path)
        place = tmp_path / "folder" if path.startswith("folder") else tmp_path / path
        for call in (lambda: load_text(str(place), "train"), lambda: has_test_split(str(place))):
            with pytest.raises(InputError, match=f"{path} is a pipe, a device or a broken link|no dataset, file or"):
                call()

    def test_a_folder_of_everything_is_refused_before_it_is_gone_through(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_sources, "_MOST_FOLDERS", 100)
        with pytest.raises(InputError, match=r"(over 100 folders in|cannot read) /"):
            load_text("/", "train")
        monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", str(path))))
        with pytest.raises(InputError, match=rf"cannot read {tmp_path} \(no\); give the folder"):
            load_text(str(tmp_path), "train")

    def test_parts_of_a_kind_that_is_not_read_are_named(self, tmp_path, caplog):
        for name in ("train_1.jsonl.zst", "train_2.jsonl.zst", "train.txt", "LICENSE"):
            write(tmp_path / name, b"x")
        assert load_text(str(tmp_path), "train").documents == ["x"]
        assert [record.message for record in caplog.records] == [
            f"2 files are left out, such as {tmp_path}/train_1.jsonl.zst; {text_sources._ACCEPTED}"
        ]

    def test_texts_in_several_folders_are_not_mixed(self, tmp_path):
        for folder in ("wikitext-103-v1", "wikitext-2-v1"):
            write(tmp_path / folder / "train.txt", b"x")
        with pytest.raises(InputError, match=r"several texts are called train: .*wikitext-103-v1/train.txt, .*2-v1/tr"):
            load_text(str(tmp_path), "train")


class TestNamedDatasets:
    @pytest.mark.parametrize(
        ("name", "file"),
        [
            ("wikitext2", "wikitext2/{}.txt"),
            ("wikitext2", "Salesforce/wikitext/wikitext-2-raw-v1/{}-00000-of-00001.txt"),
            ("wikitext2", "wikitext/{}.txt"),
            ("wikitext2", "wikitext-2-raw-v1/wiki.{}.raw"),
            ("c4", "allenai/c4/en/c4-{}.txt"),
        ],
    )
    def test_a_local_copy_is_found_under_its_usual_names(self, tmp_path, name, file):
        for split in ("train", "test"):
            write(tmp_path / file.format(split), split.encode())
        assert [load_text(name, s, dataset_root=tmp_path).documents for s in ("train", "test")] == [["train"], ["test"]]
        assert has_test_split(name, tmp_path)

    @pytest.mark.parametrize(
        ("name", "folder"),
        [
            *(("wikitext2", f"wikitext/{of}") for of in ("wikitext-2-v1", "wikitext-103-v1", "wikitext-103-raw-v1")),
            *(("c4", f"allenai/c4/{of}") for of in ("en.noblocklist", "en.noclean", "multilingual", "realnewslike")),
        ],
    )
    def test_another_configuration_is_another_text(self, tmp_path, name, folder):
        write(tmp_path / folder / "train.txt", b"other")
        with pytest.raises(InputError, match=f"no train text in .*; not read: .*{folder.split('/')[-1]}"):
            load_text(name, "train", dataset_root=tmp_path)

    def test_a_single_file_is_found_by_the_start_of_its_name_and_several_are_not_guessed_at(self, tmp_path):
        write(tmp_path / "c4_demo.jsonl", b'{"text": "x"}')
        assert load_text("c4", "train", dataset_root=tmp_path).documents == ["x"]
        assert not has_test_split("c4", tmp_path)
        write(tmp_path / "c4_other.txt", b"y")
        with pytest.raises(InputError, match="called 'c4'; known datasets"):
            load_text("c4", "train", dataset_root=tmp_path)

    def test_a_clone_gives_the_published_file_and_not_its_neighbours(self, tmp_path):
        for file in ("en/c4-train.00000-of-01024", "en/c4-train.00001-of-01024", "de/c4-train.00000-of-00512"):
            content = gzip.compress(json.dumps({"text": file}).encode(), mtime=0)
            write(tmp_path / "c4" / f"{file}.json.gz", content)
        assert load_text("c4", "train", dataset_root=tmp_path).documents == ["en/c4-train.00000-of-01024"]

    @pytest.mark.parametrize("name", ["c4", "pydocs", "wikitxt"])
    def test_a_missing_text_is_said_and_never_downloaded(self, tmp_path, monkeypatch, name):
        monkeypatch.setattr(text_sources, "_download", pytest.fail)
        monkeypatch.setattr(text_sources, "EMBEDDED_TEXT", tmp_path / "pydocs")
        expected = f"called '{name}'; known datasets: pydocs, wikitext2, c4, alpaca; looked for .*{name}"
        for call in (lambda: load_text(name, "train", dataset_root=tmp_path), lambda: has_test_split(name, tmp_path)):
            with pytest.raises(InputError, match=expected):
                call()

    @pytest.mark.parametrize("count", [7, 36, 999])
    def test_alpaca_is_split_as_the_literature_does(self, tmp_path, count):
        """Oracle: two calls of the datasets library, as in SliceGPT."""
        rows = [{"text": f"row {number}"} for number in range(count)]
        write(tmp_path / "alpaca" / "any.json", json.dumps(rows).encode())
        parts = Dataset.from_list(rows).train_test_split(test_size=0.2, seed=42)
        held_out = parts["test"].train_test_split(test_size=0.5, seed=42)
        train, test = (load_text("alpaca", s, dataset_root=tmp_path).documents for s in ("train", "test"))
        assert (train, test) == (parts["train"]["text"][:], held_out["train"]["text"][:])
        assert set(train).isdisjoint(test)
        assert has_test_split("alpaca", tmp_path)

    def test_a_file_in_the_hub_cache_needs_no_network(self, tmp_path, unreachable_hub):
        snapshot = hub_cache(tmp_path, "datasets--Salesforce--wikitext")
        file = snapshot / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        Dataset.from_list([{"text": ""}, {"text": " = Title = \n"}]).to_parquet(file)
        text = load_text("wikitext2", "test", cache_dir=tmp_path)
        assert text == TextDataset("wikitext2", "test", ["", " = Title = \n"], "\n\n")

    @pytest.mark.parametrize("is_offline", [True, False])
    @pytest.mark.parametrize(
        ("name", "problem"), [("wikitext2", "from the Hugging Face Hub"), ("some/text", "could not get some/text .*")]
    )
    def test_a_missing_network_is_one_line(self, tmp_path, unreachable_hub, monkeypatch, name, problem, is_offline):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
        expected = rf"{problem} ?\(.+\); without a network give a folder with a copy as dataset_root"
        with pytest.raises(InputError, match=expected) as caught:
            load_text(name, "train", cache_dir=tmp_path)
        assert "\n" not in str(caught.value)
        assert all(map(has_test_split, ("wikitext2", "c4", "alpaca")))


SEVERAL = "---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n---\n"


class TestHubIds:
    """The library reads a folder in the hub's layout: only the way from the id to a folder is another."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        folder, load_dataset = tmp_path / "hub", datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", lambda hub_id, **options: load_dataset(str(folder), **options))
        return folder

    @pytest.mark.parametrize("test", ["test", "validation"])
    def test_a_dataset_is_read_by_its_id_with_its_splits(self, hub, tmp_path, test):
        for split in ("train", test):
            write(hub / "data" / f"{split}-00000-of-00001.jsonl", f'{{"text": "{split} \\ud83d\\ude00"}}'.encode())
        for split, found in (("train", "train"), ("test", test)):
            text = load_text("some/text", split, cache_dir=tmp_path / "cache")
            assert text == TextDataset("some/text", split, [f"{found} \U0001f600"], "\n\n")
        assert has_test_split("some/text")

    def test_one_of_several_configurations_is_named(self, hub, tmp_path):
        write(hub / "README.md", SEVERAL.encode())
        for name in ("a", "b"):
            write(hub / f"{name}.jsonl", f'{{"text": "of {name}"}}'.encode())
            write(tmp_path / "some" / "text" / name / "train.txt", name.encode())
        assert load_text("some/text:b", "train", cache_dir=tmp_path / "cache").documents == ["of b"]
        assert load_text("some/text:b", "train", dataset_root=tmp_path).documents == ["b"]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"README.md": SEVERAL, "a.jsonl": '{"text": "x"}'}, r"some/text .*\['a', 'b'\].*some/text:NAME"),
            ({"hub.py": "raise SystemExit('run')"}, r"could not get some/text .*scripts are no longer.*; without"),
            ({"x.jsonl": '{"text": "x"}\n{"text": '}, "could not get some/text .*; without a network"),
            ({"x.jsonl": '{"text": null}'}, r"some/text, record 1 has text \(NoneType\); accepted"),
            ({"test.jsonl": '{"text": "x"}'}, "some/text has no train split, but test; give"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_used_is_one_line(self, hub, tmp_path, files, message):
        for name, content in files.items():
            write(hub / name, content.encode())
        with pytest.raises(InputError, match=message) as caught:
            load_text("some/text", "train", cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("content", "count"), [(b"plain", 1), (None, 0)])
    def test_a_program_says_one_line_about_it_or_none(self, tmp_path, content, count):
        """In a process of its own: the library reads how much to say when it is imported."""
        file = tmp_path / "hub" / "train.parquet"
        file.parent.mkdir()
        Dataset.from_list([{"text": "x"}]).to_parquet(file)
        if content is not None:
            file.write_bytes(content)
        said = run_python(f"""if True:
            import contextlib, io, pathlib
            from flatllmbench.logs import logging_to
            from flatllmcore.errors import run_program
            from flatllmcore.utils.text_sources import load_text
            def work():
                with logging_to(pathlib.Path({str(tmp_path)!r}, "log")):
                    import datasets
                    load_dataset = datasets.load_dataset
                    datasets.load_dataset = lambda hub_id, **options: load_dataset({str(file.parent)!r}, **options)
                    assert load_text("some/text", "train", cache_dir={str(tmp_path)!r}).documents == ["x"]
            with contextlib.redirect_stderr(io.StringIO()) as said:
                run_program(work)
            print(said.getvalue(), end="")""")
        assert said.count("\n") == said.count("error: could not get some/text") == count

    @pytest.mark.parametrize("place", ["root/some/text", "root/text", "some/text"])
    def test_a_local_copy_or_a_path_is_never_downloaded(self, tmp_path, monkeypatch, place):
        monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
        monkeypatch.chdir(tmp_path)
        write(tmp_path / place / "test.txt", b"x")
        root = tmp_path / "root" if place.startswith("root") else None
        assert load_text("some/text", "test", dataset_root=root).documents == ["x"]
        assert has_test_split("some/text", root)
        with pytest.raises(InputError, match="called 'other/text'; known datasets"):
            load_text("other/text", "test", dataset_root=tmp_path / "other")
        with pytest.raises(InputError, match=r"called 'some/file\.txt'; known datasets"):
            load_text("some/file.txt", "test")


@pytest.fixture
def unreachable_hub(monkeypatch):
    """Points the hub's client at a port that nobody listens on; it tries again at once and not after seconds."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
