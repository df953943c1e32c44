"""The library with FedCore: with a stand-in always, and with the checkout that FEDCORE_HOME names if it does."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from flatllmcore.core.calibration import ModelInMemory
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.stopwatch import Stopwatch
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from fedcore_stand_in import REASSEMBLERS, write_fedcore
from flatllmcore import InputError
from flatllmcore.core.absorption import AbsorptionCompressor, ActivationCollector
from flatllmcore.core.moments import collect_moments
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.utils.layer_utils import dimensions_from_config
from python_process import BLOCKED, LIBRARY, run_python

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


def test_registered_inside_fedcore_s_own_file_it_is_its_subclass(tmp_path):
    """FedCore's module is then only half imported when this library asks for its base class."""
    lines = "\nfrom flatllmcore import FlatLLMReassembler\nREASSEMBLERS['flat-llm'] = FlatLLMReassembler\n"
    code = """
from fedcore.algorithm.low_rank.reassembly.core_reassemblers import Reassembler, get_reassembler
print(isinstance(get_reassembler("flat-llm"), Reassembler))
"""
    assert run_python(code, [write_fedcore(tmp_path, REASSEMBLERS + lines), LIBRARY]) == "True\n"


@pytest.mark.parametrize("trouble", ["import no_such_module", "raise RuntimeError('no display')", "pass"])
def test_a_fedcore_that_cannot_be_used_is_done_without(trouble, tmp_path):
    code = "from flatllmcore import FlatLLMReassembler; print([c.__name__ for c in FlatLLMReassembler.__mro__])"
    found = run_python(code, [write_fedcore(tmp_path, trouble), LIBRARY])
    assert found == "['FlatLLMReassembler', 'StandaloneReassembler', 'object']\n"


@pytest.mark.skipif("FEDCORE_HOME" not in os.environ, reason="FEDCORE_HOME names no checkout of FedCore")
def test_registered_with_fedcore_itself_it_compresses():
    paths = [Path(os.environ["FEDCORE_HOME"]), LIBRARY]
    assert run_python(REGISTER_AND_COMPRESS, paths).endswith("done\n")


ABSORB_BY_TOP_LEVEL_MODULE = """
import sys
import torch
from fedcore.flat_llm import AbsorptionCompressor, ActivationCollector
assert sys.modules["absorption"].__package__ == ""
print(AbsorptionCompressor.__module__)

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
print(model.num_parameters() < before)
"""


def test_fedcore_loads_absorption_of_the_installed_package_as_a_module_without_one(tmp_path):
    printed = run_python(ABSORB_BY_TOP_LEVEL_MODULE, [write_fedcore(tmp_path), LIBRARY])
    assert printed == "flatllmcore.core.absorption_compressor\nTrue\n"


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(LIBRARY / "flatllmcore", folder, ignore=shutil.ignore_patterns("__pycache__")))


def test_fedcore_loads_absorption_of_a_named_folder_as_a_module_without_a_package(tmp_path):
    folder = copied(tmp_path / "elsewhere" / "flat_llm_copy")
    printed = run_python(ABSORB_BY_TOP_LEVEL_MODULE, [write_fedcore(tmp_path)], FLATLLM_PATH=str(folder))
    assert printed == "flat_llm_copy.core.absorption_compressor\nTrue\n"


WHICH_COPY = """
import sys
from pathlib import Path
print(Path(sys.modules[AbsorptionCompressor.__module__].__file__).parents[1])
"""


def test_fedcore_loads_absorption_of_the_copy_inside_it_where_no_package_is_installed(tmp_path):
    copy = copied(write_fedcore(tmp_path) / "fedcore" / "external" / "flatllmcore")
    *printed, place = run_python(BLOCKED + ABSORB_BY_TOP_LEVEL_MODULE + WHICH_COPY, [tmp_path]).splitlines()
    assert printed[-1] == "True"
    assert place == str(copy)


def test_absorption_takes_its_package_as_it_has_been_imported(tmp_path):
    """Whatever its name is: no class exists twice."""
    copy = copied(write_fedcore(tmp_path) / "fedcore" / "external" / "flatllmcore")
    code = """
from fedcore.external.flatllmcore import FlatLLMPruner
from fedcore.external.flatllmcore.core.absorption import AbsorptionCompressor as imported_before
from fedcore.flat_llm import AbsorptionCompressor
assert AbsorptionCompressor is imported_before
"""
    printed = run_python(BLOCKED + code + WHICH_COPY, [tmp_path], FLATLLM_PATH=str(copy))
    assert printed == f"{copy}\n"


TWO_COPIES = """
from pathlib import Path
import flatllmcore
print(Path(flatllmcore.__file__).parent)
"""
IN_TURNS = """
import importlib
from transformers import AutoModelForCausalLM
other = importlib.import_module(AbsorptionCompressor.__module__.partition(".")[0])
ours, theirs = flatllmcore.FlatLlamaForCausalLM, other.FlatLlamaForCausalLM
assert type(model) is theirs is not ours

# The library that was imported first understands what the other one made,
options = {"cal_dataset": ids, "device": "cpu"}
scores = flatllmcore.compute_layer_importance(model, **options)
assert scores == other.compute_layer_importance(model, **options)
assert flatllmcore.utils.get_layer_dimensions(model) == other.utils.get_layer_dimensions(model)
try:
    flatllmcore.apply_flat_llm(model, **options)
except flatllmcore.InputError as error:
    assert "compressed already" in str(error)
else:
    raise AssertionError("compressed twice")

# saved models load as the classes of the first,
model.save_pretrained("{folder}")
reloaded = AutoModelForCausalLM.from_pretrained("{folder}", dtype=torch.float64)
assert type(reloaded) is ours
assert torch.equal(reloaded(ids).logits, model(ids).logits)

# each makes models of its own class from its own config,
assert type(AutoModelForCausalLM.from_config(reloaded.config)) is ours
assert type(AutoModelForCausalLM.from_config(model.config)) is theirs

# and takes the other's config.
config = other.FlatLLMConfig(target_sparsity=0.4, **options)
by_ours = flatllmcore.FlatLLMReassembler.reassemble(tiny_model(), None, config)
by_theirs = other.FlatLLMReassembler.reassemble(tiny_model(), None, config)
assert (type(by_ours), type(by_theirs)) == (ours, theirs)
assert torch.equal(by_ours(ids).logits, by_theirs(ids).logits)
"""


def test_two_copies_in_one_process_do_not_disturb_each_other(tmp_path):
    """FLATLLM_PATH names one copy while another of the same name has been imported."""
    copy = copied(tmp_path / "elsewhere" / "flatllmcore")
    code = TWO_COPIES + ABSORB_BY_TOP_LEVEL_MODULE + WHICH_COPY + IN_TURNS.replace("{folder}", str(tmp_path / "saved"))
    printed = run_python(code, [write_fedcore(tmp_path), LIBRARY], FLATLLM_PATH=str(copy)).splitlines()
    assert (printed[0], printed[-1]) == (str(LIBRARY / "flatllmcore"), str(copy))


def absorb(model, ids, mask=None, layers=(0, 1), of_mlp=0.5, of_attention=0.5):
    compressor = AbsorptionCompressor(model=model, target_sparsity=0.3, tolerance=0.96, device="cpu")
    compressor.collect_all_activations(layer_indices=list(layers), calibration_input_ids=ids, attention_mask=mask)
    for layer_idx in layers:
        compressor.apply_absorption_mlp(layer_idx=layer_idx, sparsity_ratio=of_mlp)
        compressor.apply_absorption_attention(layer_idx=layer_idx, sparsity_ratio=of_attention)
    compressor.patch_compressed_layers(list(layers))
    return model


def assert_same_weights(one, other):
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


class TestAbsorption:
    IDS = torch.randint(1, 97, (8, 16), generator=torch.Generator().manual_seed(0))

    def test_it_is_the_pipeline_s_compression(self, model):
        """Oracle: compress_layers with these ranks and widths."""
        expected = tiny_model(model.config.model_type)
        dimensions = dimensions_from_config(expected.config)
        allocation = RankAllocation(50.0, False, 1, (0.5, 0.5), (6, 6), (28, 28), dimensions)
        device = torch.device("cpu")
        source = ModelInMemory(expected, device)
        flat_config, _ = compress_layers(
            source, source, self.IDS, allocation, batch_size=512, tolerance=0.96, stopwatch=Stopwatch(device)
        )
        source.adopt(flat_config)
        assert absorb(model, self.IDS) is model
        assert_same_weights(model, expected)

    def test_ratios_are_shares_kept(self):
        model = absorb(tiny_model(), self.IDS, of_mlp=0.75, of_attention=0.25)
        assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [42, 42]
        assert [layer.self_attn.value_head_dim for layer in model.model.layers] == [3, 3]

    def test_without_a_ratio_the_compressor_s_own_is_taken(self):
        model = absorb(tiny_model(), self.IDS, of_mlp=None, of_attention=None)
        assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [16, 16]

    def test_layers_that_are_not_named_stay_as_they_are(self, tmp_path):
        model, dense = absorb(tiny_model(), self.IDS, layers=[1]), tiny_model()
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
        assert model.model.layers[1].mlp.up_proj.out_features == 28
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(self.IDS).logits, model(self.IDS).logits)

    @pytest.mark.parametrize("with_mask", [True, False])
    @pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
    def test_padding_counts_for_nothing(self, with_mask, side):
        """Oracle: the same ids without padding."""
        padding = torch.zeros(8, 5, dtype=torch.int64)
        ids = torch.cat([self.IDS, padding] if side else [padding, self.IDS], dim=1)
        model = absorb(tiny_model(pad_token_id=0), ids, (ids != 0).long() if with_mask else None)
        assert_same_weights(model, absorb(tiny_model(pad_token_id=0), self.IDS))

    def test_a_model_without_padding_id_is_padded_with_what_ends_a_text(self):
        padded = torch.cat([self.IDS, torch.full((8, 5), 96)], dim=1)
        ids = self.IDS.where(self.IDS != 96, 95)
        padded[:, :16] = ids
        model = absorb(tiny_model(eos_token_id=96), padded)
        assert_same_weights(model, absorb(tiny_model(eos_token_id=96), ids))

    def test_the_model_is_as_it_was_until_it_is_patched(self):
        model, dense = tiny_model(), tiny_model()
        compressor = AbsorptionCompressor(model=model)
        compressor.collect_all_activations([0, 1], self.IDS)
        compressor.apply_absorption_mlp(0, 0.5)
        assert type(model) is type(dense)
        assert_same_weights(model, dense)

    @pytest.mark.parametrize("share", [0, 1.5, -1])
    def test_a_share_out_of_range_is_refused(self, share):
        with pytest.raises(InputError, match="target_sparsity is"):
            AbsorptionCompressor(model=tiny_model(), target_sparsity=share)
        compressor = AbsorptionCompressor(model=tiny_model())
        compressor.collect_all_activations([0], self.IDS)
        with pytest.raises(InputError, match="sparsity_ratio is"):
            compressor.apply_absorption_mlp(0, share)

    def test_layers_that_do_not_exist_or_were_not_collected_are_refused(self):
        compressor = AbsorptionCompressor(model=tiny_model())
        with pytest.raises(InputError, match="no layer 2"):
            compressor.collect_all_activations([0, 2], self.IDS)
        compressor.collect_all_activations([0], self.IDS)
        with pytest.raises(InputError, match="no activations are collected for layer 1"):
            compressor.apply_absorption_attention(1, 0.5)

    def test_the_collector_sums_the_layer_s_moments(self):
        """Oracle: collect_moments."""
        model = tiny_model()
        layer, states = model.model.layers[0], torch.randn(2, 5, 32, dtype=torch.float64)
        arguments = {"position_embeddings": model.model.rotary_emb(states, torch.arange(5)[None])}
        with torch.no_grad(), ActivationCollector(layer, num_heads=4, tolerance=0.96, device="cpu") as found:
            layer(states, **arguments)
        expected_of = collect_moments(layer, dimensions_from_config(model.config), Stopwatch(torch.device("cpu")))
        with torch.no_grad(), expected_of as expected:
            layer(states, **arguments)
        assert torch.equal(found.value, expected.value)
        assert torch.equal(found.mlp, expected.mlp)
        with pytest.raises(InputError, match="num_heads is 7"):
            ActivationCollector(layer, num_heads=7)
