"""Score the layers of a language model (`bi`), or compress it (`flatllm`, `flatllm+`).

    python main.py --model models/pydocs-llama --dataset pydocs --prune_method bi --bi_score out/scores
    python main.py --model models/pydocs-llama --dataset pydocs --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/pydocs-llama-20
    python main.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2+c4 --eval_dataset wikitext2 c4 \\
        --sparsity_ratio 20 30 --save_model out/llama-2-7b

The last writes out/llama-2-7b-20 and out/llama-2-7b-30. `flatllm` takes ranks or scores from --bi_score where they are,
and else scores the model on the way.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

try:
    from flatllmbench.command_line import Options, answer_at_once, command_line, parse_options
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; install first: pip install -r requirements.txt (INSTALL.md)")

if __name__ == "__main__":
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # torch makes it when it is imported, by itself in TMPDIR
        with suppress(OSError):
            os.makedirs(place := os.path.expanduser("~/.cache/torchinductor"), exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = place
    answer_at_once(__doc__ or "")

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from flatllmbench.logs import logging_to
from flatllmbench.provenance import costs, hardware, versions
from flatllmbench.records import Record
from flatllmbench.request import check_places, check_request
from flatllmbench.zero_shot import evaluate_saved, load_tasks
from flatllmcore.checkpoint_run import CheckpointRun, Target
from flatllmcore.errors import InputError, complain, mendable, open_streams
from flatllmcore.methods import METHODS
from flatllmcore.utils.checkpoint import MODEL_CARD, model_card, partial_folder
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.files import digest, read_json, write_json
from flatllmcore.utils.processes import (
    OtherProcessError,
    broadcast_object,
    check_launch,
    is_first_failure,
    is_rank_0,
    process_group,
)
from flatllmcore.utils.stopwatch import Stopwatch

logger = logging.getLogger("flatllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    open_streams()
    try:
        check_launch()
        options, flags = parse_options(argv, __doc__ or "")
        device = parse_device(options.device)
    except InputError as error:
        with suppress(InputError), process_group(torch.device("cpu")):
            return complain_once(str(error))
        return complain(str(error))  # of every process: there is no group
    program = Program(options, flags, command_line(sys.argv[1:] if argv is None else argv), Stopwatch(device))
    try:
        with process_group(device):
            kept = broadcast_object(program.check)  # what all would refuse, one refuses
            log = options.record_place.with_suffix(".log")
            with logging_to(log), logging_redirect_tqdm(), program.stopwatch.running():
                if options.prune_method == "bi":
                    program.score()
                else:
                    program.compress(kept)
    except (InputError, OtherProcessError) as error:
        return complain_once(str(error), isinstance(error, InputError))
    except KeyboardInterrupt:
        return complain_once(f"interrupted; {program.finished()}; go on with: {program.command}")
    except (OSError, MemoryError, RuntimeError) as error:
        problem = mendable(error, options.save)  # a log that cannot be written does not say its name
        return complain_once(f"{problem}; {program.finished()}; mend that and run: {program.command}")
    return 0


def complain_once(message: str, is_own: bool = True) -> int:
    """Say in one line what was wrong, unless another process has, or its end is all; return the exit status."""
    return complain(message) if is_first_failure(is_own) else 2


@dataclass(frozen=True)
class Program:
    """One run: its options, the flags and the command as given, and where its time goes."""

    options: Options
    flags: Mapping[str, Any]
    command: str
    stopwatch: Stopwatch

    def finished(self) -> str:
        """Say what a run that was stopped leaves to go on from."""
        folders = [partial_folder(one.save_model) for one in self.options.each_ratio() if one.save_model is not None]
        layers = "".join(f", finished layers in {folder}" for folder in folders if os.path.exists(folder))
        return f"scores and ranks finished so far stay in {self.options.score_place}{layers}"

    def check(self) -> list[Record | None]:
        """Refuse what can be refused before work; return this command's records of what is done, unless all is."""
        check_request(self.options)
        kept = {one: self.kept_record(one) for one in self.options.each_ratio()}
        if all(record and not self.is_unevaluated(record) for record in kept.values()):
            kept = dict.fromkeys(kept)
        for one in (one for one, record in kept.items() if record is None):
            check_places(one)
        return list(kept.values())

    def kept_record(self, options: Options) -> Record | None:
        """Return the record of a ratio if it is this command's, and of the model that is in its place."""
        card, place = options.save_model and options.save_model / MODEL_CARD, options.record_place
        record = read_json(place, Record) if place.is_file() else None
        if record is not None and "kind" not in record:
            raise InputError(f"{place} is no record; move it, or give another --save")
        if record is None or card is None or not card.is_file():
            return None
        ours = self.asked() | {"card_sha256": digest(card.read_bytes())}
        return record if ours.items() <= record.items() else None

    def is_unevaluated(self, record: Record) -> bool:
        """Tell whether the tasks that were asked for are missing in the record of a model."""
        return self.options.eval_zero_shot and "zero_shot" not in record

    def score(self) -> None:
        """Write the model's importance scores, and the record of the run."""
        run = CheckpointRun(self.options, self.provenance())
        for one in self.options.each_ratio():
            run.pipeline.check_target(one.keep_ratio)
        scores = run.score()
        found = {name: getattr(scores, name) for name in ("nsamples", "seqlen", "scores", "zero_rows")}
        self.keep_record(self.options, found | costs(self.stopwatch))

    def compress(self, kept: Sequence[Record | None]) -> None:
        """Compress the model at each ratio that is not done, measure it before and after, save it and its record."""
        options = self.options
        # Refused before anything is read, and not counted among the costs.
        is_evaluated = options.eval_zero_shot and is_rank_0()
        where = (options.include_path, options.dataset_root)
        tasks = load_tasks(options.tasks, options.num_fewshot, *where) if is_evaluated else None
        each = list(zip(options.each_ratio(), kept, strict=True))
        done = [(one, record) for one, record in each if record is not None]
        for one, record in done:
            logger.info("the compressed model is in %s", one.save_model)
            if self.is_unevaluated(record):
                self.evaluate(one, record, str(one.save_model), tasks)
        if left := [one for one, record in each if record is None]:
            self.stopwatch.restart()
            run = CheckpointRun(options, self.provenance())
            for one, target in zip(left, run.prepare(left, [one for one, _ in done]), strict=True):
                self.compress_to(run, target, one, tasks)
                self.stopwatch.restart()

    def compress_to(self, run: CheckpointRun, target: Target, options: Options, tasks: Record | None) -> None:
        """Compress the model at one ratio, and evaluate it on the tasks, if there are any."""
        with run.output_folder(options.save_model) as folder:
            with run.compressed(target, folder) as (done, sink):
                result = done | costs(self.stopwatch)
                card = model_card(self.asked() | result, METHODS[options.method].words(not options.preserve_qk_layers))
                result["card_sha256"] = digest(card.encode())
                self.keep_record(options, result)
                sink.publish(card)  # last: then all is there
            if options.save_model is not None:
                logger.info("compressed model is in %s", options.save_model)
            self.evaluate(options, result, str(folder), tasks)

    def evaluate(self, options: Options, result: Record, folder: str, tasks: Record | None) -> None:
        """Add to the record of a compression how the model in ``folder`` does on the tasks, if there are any."""
        if tasks is not None:
            settings = (self.stopwatch.device, options.eval_batch_size, options.limit)
            self.keep_record(options, {**result, "zero_shot": evaluate_saved(folder, tasks, *settings)})

    def provenance(self) -> dict[str, Any]:
        """Return the hardware and the versions that a result depends on."""
        return {"hardware": hardware(self.stopwatch.device), "versions": versions()}

    def asked(self) -> dict[str, Any]:
        """Return what a record begins with: what was asked for, and what the result depends on beside that."""
        return {"kind": self.options.prune_method, "command": self.command, "request": self.flags} | self.provenance()

    def keep_record(self, options: Options, result: Record) -> None:
        """Write the record of the run, or of one ratio."""
        if is_rank_0():
            write_json(options.record_place, self.asked() | result)


if __name__ == "__main__":
    sys.exit(main())
