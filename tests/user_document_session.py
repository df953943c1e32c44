"""The flatllmcore user document's samples in one session, as a stranger types them: each on a fresh model, in order.

    python tests/user_document_session.py flatllmcore FOLDER
    python tests/user_document_session.py fedcore.algorithm.low_rank.reassembly.core_reassemblers FOLDER

The first argument is what is imported first; FOLDER gets a tiny model, which stands in for the hub id, a text for
WikiText-2, the package as `external/flatllmcore`, and a stand-in for FedCore that registers our class at its end.
"""

import importlib
import sys
from pathlib import Path

from conftest import tiny_model
from fedcore_stand_in import REASSEMBLERS, write_fedcore
from python_process import LIBRARY
from tiny_text import documents, word_tokenizer
from user_document import SAMPLES

REGISTERED = "\nfrom flatllmcore import FlatLLMReassembler\nREASSEMBLERS['flat-llm'] = FlatLLMReassembler\n"
UNSAID = """
from flatllmcore import *
from transformers import AutoModelForCausalLM
from fedcore.algorithm.low_rank.reassembly.core_reassemblers import REASSEMBLERS, Reassembler
model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
"""  # what the document leaves out, the model anew before each sample


def main(first: str, folder: Path) -> None:
    """Run every sample; print what they do, and at last that the registered class is one of FedCore's."""
    model, text = str(folder / "model"), folder / "text.txt"
    tiny_model().float().save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    text.write_text("\n".join(documents(400)))
    (folder / "external").mkdir()
    (folder / "external" / "flatllmcore").symlink_to(LIBRARY / "flatllmcore")
    sys.path[:0] = map(str, (write_fedcore(folder, REASSEMBLERS + REGISTERED), LIBRARY, folder))
    importlib.import_module(first)
    from flatllmcore.utils import text_sources

    text_sources._download = lambda *_: text
    names: dict[str, object] = {}
    for sample in SAMPLES.values():
        exec((UNSAID + sample).replace("meta-llama/Llama-2-7b-hf", model), names)
    kinds = names["FlatLLMReassembler"], names["Reassembler"]
    sys.stdout.write(f"One of FedCore's: {issubclass(*kinds)} {isinstance(names['reassembler'], kinds[0])}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
