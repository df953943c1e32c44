"""What the programs share in talking to a terminal and to a log."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

import huggingface_hub
import transformers

from flatllmcore.utils.processes import is_rank_0


class LogFile(logging.FileHandler):
    """A log file that is made, folder and all, for its first line; the run ends when it cannot be written."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Let the error that is being handled end the run."""
        raise  # noqa: PLE0704 (called while the error is handled)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the console and to the end of a file inside the block, from rank 0 alone; other libraries log errors."""
    transformers.utils.logging.set_verbosity_error()
    raised, logging.raiseExceptions = logging.raiseExceptions, False  # of a console that takes no more
    keep_bars_to_terminals()
    huggingface_hub.utils.logging.set_verbosity_error()
    os.environ["DATASETS_VERBOSITY"] = "critical"  # read when the library is imported; what it logs it raises too
    for name in ("flatllm", "flatllmcore", "flatllmbench"):
        logging.getLogger(name).setLevel(logging.INFO if is_rank_0() else logging.CRITICAL)
    handlers = (logging.StreamHandler(sys.stdout), LogFile(path, delay=True)) if is_rank_0() else ()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.raiseExceptions = raised
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def keep_bars_to_terminals() -> None:
    """Let transformers, datasets and the hub draw their bars where stderr is a terminal, and nowhere else."""
    if not (sys.stderr.isatty() and is_rank_0()):
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
