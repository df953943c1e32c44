"""Make an ordinary folder of a GGUF file, for programs that read no such files, and once for several runs.

python scripts/dequantize.py model.Q4_1.gguf out/model
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from flatllmbench.logs import keep_bars_to_terminals
from flatllmcore.errors import InputError, run_program
from flatllmcore.utils.checkpoint import MODEL_CARD
from flatllmcore.utils.files import check_writable, temporary_folder
from flatllmcore.utils.loading import found_file, load_model, load_tokenizer, save_whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file, or a folder that holds one")
    parser.add_argument("folder", type=Path, help="which must not be there yet")
    args = parser.parse_args(argv)
    keep_bars_to_terminals()
    return run_program(lambda: dequantize(args.model, args.folder), args.folder)


def dequantize(model: str, folder: Path) -> None:
    """Write a model with its tokenizer to ``folder``, which is there when all is in it."""
    if os.path.lexists(folder):
        raise InputError(f"{folder} is there; give another folder")
    check_writable(folder.parent)
    with temporary_folder(folder.parent) as place:
        whole = place / folder.name
        save_whole(load_model(model), load_tokenizer(model), model, whole)
        if card := found_file(model, MODEL_CARD, None):
            shutil.copyfile(card, whole / MODEL_CARD)
        whole.rename(folder)
    print(f"the dequantised model is in {folder}")


if __name__ == "__main__":
    sys.exit(main())
