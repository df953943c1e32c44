"""The library with FedCore: with a stand-in always, and with the checkout that FEDCORE_HOME names if it does."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import assert_same_weights, tiny_model
from fedcore_stand_in import REASSEMBLERS, write_fedcore
from flatllmcore import InputError
from flatllmcore.core.absorption import AbsorptionCompressor
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.methods import METHODS
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.layer_utils import dimensions_from_config
from python_process import LIBRARY, run_python

REGISTER_AND_COMPRESS = """
import sys
import flatllmcore
assert not [name for name in ("fedcore", "datasets", "matplotlib") if name in sys.modules]

from fedcore.algorithm.low_rank.reassembly.core_reassemblers import REASSEMBLERS, Reassembler, get_reassembler
from flatllmcore import FlatLLMReassembler

from conftest import tiny_model
from tiny_text import documents, word_tokenizer

tokenizer = word_tokenizer()
assert issubclass(FlatLLMReassembler, Reassembler)
sizes = set()
for registered in (FlatLLMReassembler, lambda: FlatLLMReassembler):
    REASSEMBLERS["flat-llm"] = registered
    reassembler = get_reassembler("flat-llm")
    model = tiny_model()
    before = model.num_parameters()
    options = {"cal_dataset": documents(60), "cal_nsamples": 8, "seqlen": 16, "device": "cpu"}
    assert reassembler.reassemble(model, tokenizer=tokenizer, **options) is model
    assert model.num_parameters() < before
    sizes.add(model.num_parameters())
assert len(sizes) == 1
print("done")
"""
# The stand-in counts the calls of its own check.
DEVICES_WERE_CHECKED = "assert FlatLLMReassembler.checked == 2\n"


def test_registered_as_class_or_maker_it_compresses(tmp_path):
    paths = [write_fedcore(tmp_path), LIBRARY]
    assert run_python(REGISTER_AND_COMPRESS + DEVICES_WERE_CHECKED, paths).endswith("done\n")


@pytest.mark.parametrize(
    "first", ["fedcore.algorithm.low_rank.reassembly.core_reassemblers", "flatllmcore.reassembler"]
)
def test_registered_inside_fedcore_s_own_file_it_is_its_subclass(first, tmp_path):
    """One of the two modules is only half imported when the other asks for its class."""
    lines = "\nfrom flatllmcore import FlatLLMReassembler\nREASSEMBLERS['flat-llm'] = FlatLLMReassembler\n"
    code = f"""
import {first}
from flatllmcore import FlatLLMReassembler
from fedcore.algorithm.low_rank.reassembly.core_reassemblers import Reassembler, get_reassembler
print(isinstance(get_reassembler("flat-llm"), Reassembler), type(get_reassembler("flat-llm")) is FlatLLMReassembler)
"""
    assert run_python(code, [write_fedcore(tmp_path, REASSEMBLERS + lines), LIBRARY]) == "True True\n"


@pytest.mark.parametrize("trouble", ["import no_such_module", "raise RuntimeError('no display')", "pass"])
def test_a_fedcore_that_cannot_be_used_is_done_without(trouble, tmp_path):
    code = "from flatllmcore import FlatLLMReassembler; print([c.__name__ for c in FlatLLMReassembler.__mro__])"
    found = run_python(code, [write_fedcore(tmp_path, trouble), LIBRARY])
    assert found == "['FlatLLMReassembler', 'FlatLLMMethods', 'StandaloneReassembler', 'object']\n"


@pytest.mark.skipif("FEDCORE_HOME" not in os.environ, reason="FEDCORE_HOME names no checkout of FedCore")
def test_registered_with_fedcore_itself_it_compresses():
    paths = [Path(os.environ["FEDCORE_HOME"]), LIBRARY]
    assert run_python(REGISTER_AND_COMPRESS, paths).endswith("done\n")


NOT_INSTALLED = """
import sys
from pathlib import Path
sys.path[:] = [path for path in sys.path if not Path(path, "flatllmcore").is_dir()]
"""
ABSORB = """
import sys
import torch
from fedcore.flat_llm import AbsorptionCompressor, ActivationCollector
assert sys.modules["absorption"].__package__ == ""

from conftest import tiny_model
model = tiny_model()
before = model.num_parameters()
compressor = AbsorptionCompressor(model=model, target_sparsity=0.3, tolerance=0.96, device="cpu")
ids = torch.randint(97, (8, 16), generator=torch.Generator().manual_seed(0))
compressor.collect_all_activations(layer_indices=[0, 1], calibration_input_ids=ids, attention_mask=None)
for layer_idx in (0, 1):
    compressor.apply_absorption_mlp(layer_idx=layer_idx, sparsity_ratio=0.5)
    compressor.apply_absorption_attention(layer_idx=layer_idx, sparsity_ratio=0.5)
compressor.patch_compressed_layers([0, 1])
assert model.num_parameters() < before
print(AbsorptionCompressor.__module__, sys.modules[AbsorptionCompressor.__module__].__file__)
"""


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(LIBRARY / "flatllmcore", folder, ignore=shutil.ignore_patterns("__pycache__")))


def test_fedcore_loads_absorption_as_a_module_without_a_package(tmp_path):
    """Of the package that is installed, and of a folder of any name."""
    fedcore, copy = write_fedcore(tmp_path), copied(tmp_path / "elsewhere" / "flat_llm_copy")
    of_package = run_python(ABSORB, [fedcore, LIBRARY]).split()
    assert of_package == ["flatllmcore.absorption_compressor", f"{LIBRARY}/flatllmcore/absorption_compressor.py"]
    of_copy = run_python(NOT_INSTALLED + ABSORB, [fedcore], FLATLLM_PATH=str(copy)).split()
    assert of_copy == ["flat_llm_copy.absorption_compressor", f"{copy}/absorption_compressor.py"]


def test_fedcore_loads_absorption_of_the_copy_inside_it_where_no_package_is_installed(tmp_path):
    copy = copied(write_fedcore(tmp_path) / "external" / "flatllmcore")
    printed = run_python(NOT_INSTALLED + ABSORB, [tmp_path]).split()
    assert printed == ["flatllmcore.absorption_compressor", f"{copy}/absorption_compressor.py"]


def test_absorption_takes_its_package_as_it_has_been_imported(tmp_path):
    """FLATLLM_PATH names another copy of the same name: the one that is there already serves, and nothing is mixed."""
    copy = copied(tmp_path / "elsewhere" / "flatllmcore")
    code = "import flatllmcore" + ABSORB + "assert type(model) is flatllmcore.FlatLlamaForCausalLM"
    printed = run_python(code, [write_fedcore(tmp_path), LIBRARY], FLATLLM_PATH=str(copy)).split()
    assert printed == ["flatllmcore.absorption_compressor", f"{LIBRARY}/flatllmcore/absorption_compressor.py"]


IN_TURNS = """
import external.flatllmcore as theirs
import flatllmcore as ours
from transformers import AutoModelForCausalLM
assert type(model) is ours.FlatLlamaForCausalLM is not theirs.FlatLlamaForCausalLM

# Each understands what the other one made,
options = {"cal_dataset": ids, "device": "cpu"}
scores = theirs.compute_layer_importance(model, **options)
assert scores == ours.compute_layer_importance(model, **options)
assert theirs.utils.get_layer_dimensions(model) == ours.utils.get_layer_dimensions(model)
try:
    theirs.apply_flat_llm(model, **options)
except theirs.InputError as error:
    assert "compressed already" in str(error)
else:
    raise AssertionError("compressed twice")

# saved models load, whichever made them,
model.save_pretrained("{folder}")
reloaded = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float64)
assert torch.equal(reloaded(ids).logits, model(ids).logits)

# and each makes models of its own class, from either's config.
for one, other in ((ours, theirs), (theirs, ours)):
    made = one.FlatLLMReassembler.reassemble(tiny_model(), None, other.FlatLLMConfig(target_sparsity=0.4, **options))
    assert type(made) is one.FlatLlamaForCausalLM
"""


def test_two_copies_in_one_process_do_not_disturb_each_other(tmp_path):
    """FedCore's own copy, imported as a part of it, and once more as what FedCore's loader makes of it."""
    copied(write_fedcore(tmp_path) / "external" / "flatllmcore")
    code = "import external.flatllmcore\n" + ABSORB + IN_TURNS.replace("{folder}", str(tmp_path / "saved"))
    run_python(NOT_INSTALLED + code, [tmp_path])


def absorb(model, ids, mask=None, layers=(0, 1), of_mlp=0.5, of_attention=0.5):
    compressor = AbsorptionCompressor(model=model, target_sparsity=0.3, tolerance=0.96, device="cpu")
    compressor.collect_all_activations(layer_indices=list(layers), calibration_input_ids=ids, attention_mask=mask)
    for layer_idx in layers:
        compressor.apply_absorption_mlp(layer_idx=layer_idx, sparsity_ratio=of_mlp)
        compressor.apply_absorption_attention(layer_idx=layer_idx, sparsity_ratio=of_attention)
    compressor.patch_compressed_layers(list(layers))
    return model


class TestAbsorption:
    IDS = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))

    def test_it_is_the_pipeline_s_compression(self, model):
        """Oracle: compress_layers with these ranks and widths."""
        expected = tiny_model(model.config.model_type)
        sizes = dimensions_from_config(expected.config)
        allocation = RankAllocation(50.0, False, 1, sizes, (Kept(0.5, 6, 28),) * 2)
        source = ModelInMemory(expected, torch.device("cpu"))
        flat_config, _ = compress_layers(
            source, source, self.IDS, METHODS["flatllm"], allocation, batch_size=512, tolerance=0.96
        )
        source.adopt(flat_config)
        assert absorb(model, self.IDS) is model
        assert_same_weights(model.state_dict(), expected.state_dict())

    @pytest.mark.parametrize(("shares", "widths"), [((0.75, 0.25), (42, 3)), ((None, None), (16, 3))])
    def test_ratios_are_shares_kept(self, shares, widths):
        """Without one, the compressor's own, 0.3, is taken."""
        for layer in absorb(tiny_model(), self.IDS, None, (0, 1), *shares).model.layers:
            assert (layer.mlp.down_proj.in_features, layer.self_attn.value_head_dim) == widths

    def test_layers_that_are_not_named_stay_as_they_are(self, tmp_path):
        model, dense = absorb(tiny_model(), self.IDS, layers=torch.tensor([1])), tiny_model()
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
        assert model.model.layers[1].mlp.up_proj.out_features == 28
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(self.IDS).logits, model(self.IDS).logits)

    @pytest.mark.parametrize(
        ("with_mask", "is_right", "tokens"),
        [
            (True, False, {"pad_token_id": 0}),
            (True, True, {"eos_token_id": 96}),
            (False, False, {"eos_token_id": 96}),
            (False, True, {"pad_token_id": 0}),
        ],
    )
    def test_padding_counts_for_nothing(self, with_mask, is_right, tokens):
        """Oracle: the same ids without padding; without a padding id, what ends a text pads."""
        (token,) = tokens.values()
        padding = torch.full((8, 5), token)
        ids = torch.cat([self.IDS, padding] if is_right else [padding, self.IDS], dim=1)
        model = absorb(tiny_model(**tokens), ids, (ids != token).long() if with_mask else None)
        assert_same_weights(model.state_dict(), absorb(tiny_model(**tokens), self.IDS).state_dict())

    @pytest.mark.parametrize("ends", [96, [95, 96]])
    def test_the_end_of_a_text_counts_once_where_the_tokenizer_pads_by_it(self, ends):
        """The model's own padding id is another; oracle: the ids with one end each."""
        tokens = {"pad_token_id": 0, "eos_token_id": ends}
        padded, ended = (torch.nn.functional.pad(self.IDS.clamp(max=94), (0, n), value=96) for n in (5, 1))
        model = absorb(tiny_model(**tokens), padded)
        assert_same_weights(model.state_dict(), absorb(tiny_model(**tokens), ended).state_dict())

    def test_what_cannot_be_asked_is_refused(self):
        compressor = AbsorptionCompressor(model=tiny_model())
        with pytest.raises(RuntimeError, match="before collect_all_activations"):
            compressor.patch_compressed_layers([0])
        for layer in (2, -1):
            with pytest.raises(InputError, match=f"layer_idx is {layer}; accepted: 0 to 1"):
                compressor.apply_absorption_attention(layer, 0.5)
        compressor.collect_all_activations([0], self.IDS)
        with pytest.raises(InputError, match="layer_idx is 2"):
            compressor.patch_compressed_layers([0, 2])
        for share in (0, 1.5, -1):
            with pytest.raises(InputError, match="target_sparsity is"):
                AbsorptionCompressor(model=tiny_model(), target_sparsity=share)
            with pytest.raises(InputError, match="sparsity_ratio is"):
                compressor.apply_absorption_mlp(0, share)
