"""GGUF files of dense and compressed models: run by llama.cpp, they do what transformers does with the folder."""

import json
import re
import resource
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GemmaTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import serving
from conftest import EMBEDDED, one_line
from flatllmcore import apply_flat_llm
from flatllmcore.export import _ARCHITECTURES, main
from flatllmcore.layers import compressed_config
from flatllmcore.utils.data_utils import sample_documents
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.gguf_tokenizer import CUTS
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.text_sources import load_text
from layers.published import COMMON, LLAMA_3, PUBLISHED
from layers.tiny_models import random_model
from llama_cpp import LlamaCpp
from tiny_gguf import write_gguf
from tiny_text import word_tokenizer

MIXED = "I'll don't WE'RE it's 12345 1,024 items\n\n  def café(x): return x_1  \t# naïve 北京 🙂🙂\r\n   end. ... of it"
PLAIN = "The items of a list, 12 of them: why don't they end?"
DECI = [name for name, of in PUBLISHED.items() if "deci" in _ARCHITECTURES.get(of["model_type"], ())]
FOUR = ["Llama-2-7b", "Llama with biases", "Llama-3.1-8B", "Qwen2-7B"]
PROMPTS = ("The", "Return a", "If the file", "import os\n", "def f(x):\n    return", "Python is", "An exception")
PROMPTS += ("class", "Use this function when", "The following list")
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level_tokenizer(cut: object = WORDS) -> PreTrainedTokenizerFast:
    """BPE of bytes, 280 tokens, merged within the parts that ``cut`` makes; texts begin with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    special = {"special_tokens": ["<s>", "</s>", "<pad>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator([MIXED, MIXED], trainers.BpeTrainer(vocab_size=280, show_progress=False, **special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE of characters, and of bytes for characters that it lacks, as Llama 2 and Mistral have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(["the items then,    and the end    of it"], trainers.BpeTrainer(show_progress=False))
    made = json.loads(tokenizer.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made["vocab"]]
    merges = [tuple(merge) for merge in made["merges"]]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens as Gemma has them: no space before the first word."""
    made = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())["model"]
    return GemmaTokenizer(made["vocab"], [tuple(merge) for merge in made["merges"]], bos_token="<s>", eos_token="</s>")


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny(name: str, kind: str = "dense", mlps: tuple[int, ...] = (40, 56, 17), **changed: object) -> PreTrainedModel:
    """A random published model, dense or with every layer's values, MLP, and pairs or factors of its own width."""
    fields = COMMON | PUBLISHED[name] | {"vocab_size": 400}
    if fields.get("sliding_window"):
        fields["sliding_window"] = 60  # room for a text
    fields |= changed
    dense = random_model(CONFIG_MAPPING[fields.pop("model_type")](**fields))
    if kind == "dense":
        return dense
    d = dense.model.layers[0].self_attn.head_dim
    pairs, factors = ((1, None, d // 4), (None,) * 3) if kind == "pairs" else ((None,) * 3, (d - 1, None, d // 2))
    kept = [Kept(0.5, *sizes) for sizes in zip((d // 2, d, d - 1), mlps, factors, pairs, strict=True)]
    model = AutoModelForCausalLM.from_config(compressed_config(dense.config, kept)).eval()
    for buffer, places in model.named_buffers():
        if buffer.endswith("rotary_places"):
            first = torch.stack([torch.randperm(d // 2)[: places.shape[1] // 2] for _ in places])
            places.copy_(torch.cat([first, first + d // 2], dim=1))  # both of each pair
    return model


def exported(folder: str) -> Path:
    file = Path(folder, "model.gguf")
    assert main([folder, str(file)]) == 0
    return file


@torch.no_grad()
def assert_llama_cpp_does_the_same(folder: str, text: str, length: int, gap: float) -> None:
    """Compare tokens, perplexity to 0.3 %, and greedy choices: by the logits here none is better by more than a gap."""
    model, tokenizer, other = load_model(folder).eval(), load_tokenizer(folder), LlamaCpp(exported(folder))
    for prompt in PROMPTS[: 10 if gap == 0 else 3]:
        tokens = tokenizer(prompt)["input_ids"]
        assert other.tokenize(prompt) == tokens
        answer = other.greedy(tokens, length)
        logits = model(torch.tensor([tokens + answer])).logits[0, len(tokens) - 1 : -1]
        assert len(answer) == length or answer[-1] == tokenizer.eos_token_id
        assert (logits.amax(-1) - logits[range(len(answer)), answer]).max() <= gap
    tokens = torch.tensor([tokenizer(text)["input_ids"][:64]])
    expected = model(tokens, labels=tokens).loss.exp().item()
    assert other.perplexity(tokens[0].tolist()) == pytest.approx(expected, rel=0.003)


def stated(folder: str, name: str) -> object:
    return gguf.GGUFReader(Path(folder, "model.gguf")).fields[name].contents()


@pytest.mark.slow
def test_the_embedded_model_dense_and_compressed_writes_the_same_texts(tmp_path):
    """The same 20 tokens on ten prompts, in float32: llama.cpp rounds what bfloat16 weights are multiplied with."""
    model, tokenizer = load_model(EMBEDDED, dtype="float32"), load_tokenizer(EMBEDDED)
    text = load_text("pydocs", "test").documents[0]
    dense = save(tmp_path / "dense", model, tokenizer)
    assert_llama_cpp_does_the_same(dense, text, 20, gap=0)
    windows = sample_documents(load_text("pydocs", "train"), tokenizer, 8, 128, seed=0)
    small = save(tmp_path / "small", apply_flat_llm(model, None, 0.3, windows, method="flatllm"), tokenizer)
    assert_llama_cpp_does_the_same(small, text, 20, gap=0)
    assert [stated(folder, "general.architecture") for folder in (dense, small)] == ["llama", "deci"]


@pytest.mark.slow
def test_every_program_writes_the_same_texts(tmp_path, monkeypatch, capsys):
    """The command of docs/SERVING.md: with the package, without it, by the attention of servers and by llama.cpp."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name, value in {"PROMPTS": 3, "LENGTH": 8, "SCORED": 32}.items():
        monkeypatch.setattr(serving, name, value)
    model, tokenizer = load_model(EMBEDDED, dtype="float32"), load_tokenizer(EMBEDDED)
    windows = sample_documents(load_text("pydocs", "train"), tokenizer, 8, 128, seed=0)
    small = save(tmp_path / "small", apply_flat_llm(model, None, 0.3, windows, method="flatllm"), tokenizer)
    capsys.readouterr()
    assert serving.main([EMBEDDED, small, "--out", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["programs"]
    assert [row["same 8 tokens"] for row in rows] == 4 * ["3 of 3"]
    perplexities = [[row["perplexity"], row["dense"]] for row in rows]
    assert perplexities == [pytest.approx(perplexities[0], rel=0.002)] * 4
    assert rows[0]["cache, × dense"] < 0.9
    assert rows[3]["cache, × dense"] == 1
    shown = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert shown == [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *product(DECI, ["dense"]),
        *product([*FOUR, "Helium-1-2b", "Seed-OSS-36B"], ["factors"]),
        *product([*FOUR, "Ministral-8B"], ["pairs"]),
    ],
)
def test_a_model_of_each_family_does_the_same(tmp_path, name, kind):
    folder = save(tmp_path, tiny(name, kind), byte_level_tokenizer())
    assert_llama_cpp_does_the_same(folder, PLAIN, 8, gap=0.01)
    architecture = stated(folder, "general.architecture")
    assert architecture == ("deci" if kind != "dense" else "qwen2" if "Qwen2" in name else "llama")
    # Of a window, whose end llama.cpp would not see.
    assert stated(folder, f"{architecture}.context_length") == (
        60 if PUBLISHED[name].get("sliding_window") == 5 else 128
    )


def layers(pattern: str, count: int) -> dict[str, object]:
    """Layers with windows (L) and without (G), over and over."""
    kinds = {"L": "sliding_attention", "G": "full_attention"}
    return {"num_hidden_layers": count, "layer_types": [kinds[pattern[i % len(pattern)]] for i in range(count)]}


HEADS = {"query_pre_attn_scalar": 12}  # as wide as they are
DEEP = {"initializer_range": 0.05, "query_pre_attn_scalar": 8}  # small, for every layer adds to what rounding does
LINEAR, BY_PARTS = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"rope_scaling": LLAMA_3["rope_scaling"]}
YARN = PUBLISHED["Olmo-3-7B"]["rope_scaling"]
CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}
SHORT = {"sliding_window": 5}
ONE_WIDTH = {name: {} for name in ("Qwen3-0.6B", "OLMo-2-1B", "Granite-3.1-2b", "Hunyuan-1.8B", "Command-R7B")}
ONE_WIDTH |= {"EXAONE-4.0-1.2B": {}, "Olmo-3-7B": {}, "Gemma-2-2b": HEADS, "Gemma-3-1b": HEADS}


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        *((name, "dense", fields) for name, fields in ONE_WIDTH.items()),
        *((name, "factors", {}) for name in ("Qwen3-0.6B", "OLMo-2-1B", "Granite-3.1-2b", "Command-R7B")),
        ("Granite-3.1-2b", "pairs", {}),
        ("Gemma-2-2b", "pairs", HEADS),
        ("SmolLM3-3B", "dense", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
        ("EXAONE-4.0-1.2B", "dense", BY_PARTS),
        # Windows that end within the text.
        ("Command-R7B", "dense", SHORT | {"layer_norm_eps": 0.1}),
        ("Olmo-3-7B", "dense", SHORT | {"rope_scaling": YARN | {"attention_factor": 2.0}}),
        ("Gemma-2-2b", "dense", SHORT | HEADS | CAPS | layers("GL", 3)),
        ("Gemma-3-1b", "dense", SHORT | HEADS | CAPS | LINEAR | {"rope_local_base_freq": 100.0}),
        # What llama.cpp does with so many layers and no other number.
        *(
            pytest.param(name, "dense", DEEP | fields, marks=pytest.mark.slow)
            for name, fields in (
                ("EXAONE-4.0-32B", SHORT | BY_PARTS | layers("LLG", 64) | {"head_dim": 10}),
                ("Gemma-2-2b", layers("LG", 46)),
                ("Gemma-3-1b", layers("LLLLLG", 62)),
            )
        ),
    ],
)
def test_a_model_of_an_architecture_of_one_width_does_the_same(tmp_path, name, kind, fields):
    folder = save(tmp_path, tiny(name, kind, (40, 40, 40), **fields), byte_level_tokenizer())
    assert_llama_cpp_does_the_same(folder, PLAIN, 8, gap=0.01)
    family = PUBLISHED[name]["model_type"]
    others = {"gemma3_text": "gemma3", "hunyuan_v1_dense": "hunyuan-dense", "olmo3": "olmo2"}
    architecture = stated(folder, "general.architecture")
    assert architecture == others.get(family, family)
    assert stated(folder, f"{architecture}.context_length") == 128


def cut(names: tuple[str, ...]) -> object:
    known = {"words": WORDS, "digits": pre_tokenizers.Digits(individual_digits=True)}
    steps = [known.get(name) or pre_tokenizers.Split(Regex(name), "isolated") for name in names]
    last = [] if WORDS in steps else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence([*steps, *last])


WHOLE = {"sentencepiece": sentencepiece_tokenizer, "gemma": gemma_tokenizer}


@pytest.mark.parametrize("name", [*CUTS.values(), *WHOLE])
def test_texts_become_the_same_tokens(tmp_path, name):
    names = next((names for names, value in CUTS.items() if value == name), None)
    tokenizer = byte_level_tokenizer(cut(names)) if names else WHOLE[name]()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    folder = save(tmp_path, tiny("Llama-2-7b"), tokenizer)
    other = LlamaCpp(exported(folder))
    # Behind a special token llama.cpp gives SentencePiece's words their space, transformers does where it is told to.
    for text in (MIXED, PLAIN, *PROMPTS, *(["<s>the</s>end"] if names else [])):
        assert other.tokenize(text) == tokenizer(text)["input_ids"]
    assert stated(folder, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize(("dtype", "kind"), [("float64", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_weights_keep_their_type(tmp_path, dtype, kind):
    """Matrices; vectors are F32. Not rotated and not padded, the last matrix is as it was, bit by bit."""
    model = tiny("Llama-2-7b").to(getattr(torch, dtype))
    reader = gguf.GGUFReader(exported(save(tmp_path, model, byte_level_tokenizer())))
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1} == {kind}
    assert {t.tensor_type.name for t in reader.tensors if len(t.shape) == 1} == {"F32"}
    (head,) = (tensor for tensor in reader.tensors if tensor.name == "output.weight")
    found = torch.tensor(gguf.dequantize(head.data, head.tensor_type))
    assert torch.equal(found, model.lm_head.weight.float())


def test_a_gguf_file_becomes_itself(tmp_path):
    """Oracle: tiny_gguf.py, which lays weights out by itself; tensors and what is said of tokens are equal."""
    write_gguf(tmp_path / "tiny.gguf")
    assert main([str(tmp_path / "tiny.gguf"), str(tmp_path / "again.gguf")]) == 0
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("tiny.gguf", "again.gguf"))
    expected = {tensor.name: tensor.data for tensor in before.tensors}
    assert {tensor.name for tensor in after.tensors} == expected.keys()
    assert [tensor.name for tensor in after.tensors if not np.array_equal(tensor.data, expected[tensor.name])] == []
    said = [{name: field.contents() for name, field in file.fields.items()} for file in (before, after)]
    changed = {name for name in said[0] if said[1].get(name) != said[0][name]}
    assert changed == {"general.name", "GGUF.kv_count"}


REFUSED = {
    "qwen3 with MLPs of several widths": ("Qwen3-0.6B", {"kind": "factors"}),
    "qwen3 with attention_bias": ("Qwen3 with biases and windows", {}),
    "smollm3 with positions missing in other layers": ("SmolLM3-3B", {}),
    "the activation gelu; accepted: silu": ("Llama-2-7b", {"hidden_act": "gelu"}),
    "the activation gelu; accepted: gelu_pytorch_tanh": ("Gemma-3-1b", {"hidden_activation": "gelu"}),
    "gemma2 with tie_word_embeddings = False": ("Gemma-2-2b", {"tie_word_embeddings": False}),
    "olmo2 with tie_word_embeddings = True": ("Olmo-3-7B", {"tie_word_embeddings": True}),
    "exaone4 with heads of width 8; accepted: 10": ("EXAONE-4.0-32B", {}),
    "sliding_window = 60 in 3 layers": ("EXAONE-4.0-32B", {"head_dim": 10}),
    "gemma2 with query_pre_attn_scalar other than 12": ("Gemma-2-2b", {}),
    "gemma2 with scores or logits without a cap": ("Gemma-2-2b", HEADS | {"final_logit_softcapping": None}),
    "gemma3 with attention to what comes later": ("Gemma-3-1b", HEADS | {"use_bidirectional_attention": True}),
    "of type llama3 are not written for cohere2": ("Command-R7B", BY_PARTS),
    "of type default are not written for olmo2": ("Olmo-3-7B", {"rope_scaling": None, "rope_theta": 1000.0}),
    "of type yarn are not written for olmo2": ("Olmo-3-7B", {"rope_scaling": YARN | {"beta_fast": 16.0}}),
    "of type yarn are not written for olmo2: {'attention_factor'": ("OLMo-2-1B", {"rope_scaling": YARN}),
    "has a token 279, and the model's vocabulary 270": ("Llama-2-7b", {"vocab_size": 270}),
}
REFUSED_TOKENIZERS = {
    "a tokenizer of type WordLevel; accepted: BPE": word_tokenizer,
    "cut text as this one does": lambda: byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("complaint", [*REFUSED, *REFUSED_TOKENIZERS])
def test_what_llama_cpp_does_not_compute_is_one_line_and_no_file(tmp_path, complaint, capsys):
    name, fields = REFUSED.get(complaint, ("Llama-2-7b", {}))
    model, tokenizer = tiny(name, **fields), REFUSED_TOKENIZERS.get(complaint, byte_level_tokenizer)()
    folder = save(tmp_path / "model", model, tokenizer)
    assert complaint in one_line(capsys, main, [folder, str(tmp_path / "model.gguf")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_is_one_line_and_no_file(tmp_path, capsys):
    """By a limit to the size of files, of which the system says what it says of a full disk."""
    folder = save(tmp_path / "model", tiny("Llama-2-7b"), byte_level_tokenizer())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        line = one_line(capsys, main, [folder, str(tmp_path / "model.gguf")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"error: cannot write {tmp_path / 'model.gguf'}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_there_is_replaced_only_if_asked(tmp_path, capsys):
    folder, file = save(tmp_path / "model", tiny("Llama-2-7b"), byte_level_tokenizer()), tmp_path / "model.gguf"
    file.write_text("kept")
    assert main([folder, str(file)]) == main([folder, folder]) == main([str(tmp_path), str(file)]) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert main([folder, str(file), "--overwrite"]) == 2
    assert "is no GGUF file to overwrite" in capsys.readouterr().err
    assert file.read_text() == "kept"
    file.write_bytes(b"GGUF, an earlier one")
    assert main([folder, str(file), "--overwrite"]) == 0
    assert file.stat().st_size > 1000


def test_a_family_that_the_table_lacks_is_one_line(tmp_path, capsys, monkeypatch):
    """There is none now; one that is added need not have GGUF files."""
    folder = save(tmp_path, tiny("Llama-2-7b"), byte_level_tokenizer())
    monkeypatch.delitem(_ARCHITECTURES, "llama")
    line = one_line(capsys, main, [folder, str(tmp_path / "model.gguf")])
    assert "error: GGUF files of llama are not written; accepted: qwen2, " in line
