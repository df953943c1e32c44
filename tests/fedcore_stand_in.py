"""FedCore as far as a reassembler sees it: base class, registry and loader, from FedCore's documented behaviour.

``write_fedcore(folder)`` makes an importable package ``fedcore`` of it. It is a stand-in and no copy: it shows that
the contract is met, not that FedCore is as the contract says.
"""

from pathlib import Path

MODULE = "fedcore/algorithm/low_rank/reassembly/core_reassemblers.py"

REASSEMBLERS = """
from torch import nn


class Reassembler:
    supported_layers = {nn.Linear: None}
    supported_decomposed_layers = {}

    @classmethod
    def reassemble(cls, model, additional_mapping=None, **kwargs):
        raise NotImplementedError

    @classmethod
    def _traverse_modules(cls, model):
        raise AssertionError("always calls the base conversion: not to be relied on")

    @classmethod
    def _apply_additional_mapping(cls, model, mapping):
        for name, module in list(model.named_modules()):
            if mapping and type(module) in mapping:
                cls.set_module(model, name, mapping[type(module)]())

    @classmethod
    def _validate_device_consistency(cls, model):
        cls.checked = getattr(cls, "checked", 0) + 1
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise RuntimeError("parameters are on more than one device")

    @staticmethod
    def set_module(root, name, module):
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, module)

    @staticmethod
    def get_module(root, name):
        return root.get_submodule(name)


class ParentalReassembler(Reassembler):
    pass


REASSEMBLERS = {"parental": ParentalReassembler}


def get_reassembler(reassembler_type="parental"):
    registered = REASSEMBLERS[reassembler_type]
    return registered() if reassembler_type == "flat-llm" else registered
"""

LOADER = '''
"""Finds the package and loads its module ``absorption`` without a package, as FedCore does."""

import importlib.util
import os
import sys
from pathlib import Path

installed = importlib.util.find_spec("flatllmcore")
if "FLATLLM_PATH" in os.environ:
    folder = Path(os.environ["FLATLLM_PATH"])
elif installed:
    folder = Path(installed.origin).parent
else:
    folder = Path(__file__).parents[1] / "external" / "flatllmcore"
sys.path[:0] = [str(folder / "core"), str(folder)]
from absorption import AbsorptionCompressor, ActivationCollector
'''


def write_fedcore(folder: Path, reassemblers: str = REASSEMBLERS) -> Path:
    """Write the package ``fedcore`` into ``folder``, and return ``folder``."""
    module = folder / MODULE
    module.parent.mkdir(parents=True)
    module.write_text(reassemblers)
    (folder / "fedcore" / "flat_llm.py").write_text(LOADER)
    return folder
