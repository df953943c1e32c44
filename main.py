"""Score the layers of a language model (`bi`), or compress it (`flatllm`).

    python main.py --model models/pydocs-llama --dataset pydocs --prune_method bi --bi_score out/scores
    python main.py --model models/pydocs-llama --dataset pydocs --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/pydocs-llama-20
    python main.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --prune_method flatllm \\
        --sparsity_ratio 20 --save_model out/llama-2-7b-20

`flatllm` takes ranks or scores from --bi_score where they are, and else scores the model on the way.
"""

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from flatllmbench.command_line import Options, complain, logging_to, parse_options
from flatllmbench.records import hardware, versions
from flatllmbench.zero_shot import evaluate_saved, load_tasks
from flatllmcore.checkpoint_run import CheckpointRun
from flatllmcore.errors import UNUSABLE_PLACE, InputError
from flatllmcore.utils.checkpoint import MODEL_CARD, model_card, partial_folder
from flatllmcore.utils.devices import parse_device, peak_memory_gib
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
    try:
        check_launch()
    except InputError as error:
        return complain(str(error))  # of every process: there is no group yet
    try:
        options, flags = parse_options(argv, __doc__ or "")
        device = parse_device(options.device)
    except InputError as error:
        with process_group(torch.device("cpu")):
            return complain_once(str(error))
    program = Program(options, flags, command_line(sys.argv[1:] if argv is None else argv), Stopwatch(device))
    try:
        with process_group(device):
            unevaluated = broadcast_object(program.check)  # what all would refuse, one refuses
            log = options.save / f"{options.run_name}.log"
            with logging_to(log), logging_redirect_tqdm(), program.stopwatch.running():
                if options.prune_method == "bi":
                    program.score()
                else:
                    program.compress(unevaluated)
    except (InputError, OtherProcessError) as error:
        return complain_once(str(error), isinstance(error, InputError))
    except KeyboardInterrupt:
        return complain_once(f"interrupted; {program.finished()}; go on with: {program.command}")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        place = error.filename or options.save  # a log that cannot be written does not say its name
        remedy = f"{program.finished()}; mend that and run: {program.command}"
        return complain_once(f"{error.strerror}: {place}; {remedy}")
    return 0


def command_line(argv: Sequence[str]) -> str:
    """Return what to type for this run with as many processes; on several machines, N numbers them from 0."""
    count, local_count = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == "1":
        return shlex.join(["python", "main.py", *argv])
    start = ["torchrun", "--nproc_per_node", local_count]
    if count != local_count:
        machines = ["--nnodes", str(int(count) // int(local_count)), "--node_rank", "N"]
        start += [*machines, "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return shlex.join([*start, "main.py", *argv])


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
        out = self.options.save_model
        layers = f", finished layers in {partial}" if out and os.path.exists(partial := partial_folder(out)) else ""
        return f"scores and ranks finished so far stay in {self.options.score_place}{layers}"

    def check(self) -> dict[str, Any] | None:
        """Refuse what can be refused before work; return this command's record of a model yet to be evaluated."""
        options = self.options
        options.check()
        card = options.save_model / MODEL_CARD if options.save_model and options.eval_zero_shot else None
        if card is not None and card.is_file() and self.record_place.is_file():
            record = read_json(self.record_place, dict[str, Any])
            is_ours = self.asked().items() <= record.items() and record.get("card_sha256") == digest(card.read_bytes())
            if is_ours and "zero_shot" not in record:
                return record
        options.check_places()
        return None

    def score(self) -> None:
        """Write the model's importance scores, and the record of the run."""
        started = time.perf_counter()
        scores = CheckpointRun(self.options, self.provenance()).score()
        found = {name: getattr(scores, name) for name in ("nsamples", "seqlen", "scores", "zero_rows")}
        self.keep_record(found | self.costs(started))

    def compress(self, unevaluated: Mapping[str, Any] | None) -> None:
        """Compress the model, measure it before and after, save it and the record of the run, unless that is done."""
        options = self.options
        # Refused before anything is read, and not counted among the costs.
        is_evaluated = options.eval_zero_shot and is_rank_0()
        tasks = load_tasks(options.tasks, options.num_fewshot, options.include_path) if is_evaluated else None
        if unevaluated is not None:
            logger.info("the compressed model is in %s and is still to be evaluated", options.save_model)
            self.evaluate(unevaluated, str(options.save_model), tasks)
            return
        started = time.perf_counter()
        run = CheckpointRun(options, self.provenance())
        with run.output_folder() as folder:
            with run.compressed(folder) as (done, sink):
                result = done | self.costs(started)
                card = model_card(self.asked() | result)
                result["card_sha256"] = digest(card.encode())
                self.keep_record(result)
                sink.publish(card)  # last: then all is there
            if options.save_model is not None:
                logger.info("compressed model is in %s", options.save_model)
            self.evaluate(result, str(folder), tasks)

    def evaluate(self, result: Mapping[str, Any], folder: str, tasks: Mapping[str, Any] | None) -> None:
        """Add to the record of a compression how the model in ``folder`` does on the tasks, if there are any."""
        if tasks is not None:
            settings = (self.stopwatch.device, self.options.eval_batch_size, self.options.limit)
            self.keep_record({**result, "zero_shot": evaluate_saved(folder, tasks, *settings)})

    def provenance(self) -> dict[str, Any]:
        """Return the hardware and the versions that a result depends on."""
        return {"hardware": hardware(self.stopwatch.device), "versions": versions()}

    @property
    def record_place(self) -> Path:
        """Where the record of the run is written."""
        return self.options.save / f"{self.options.run_name}.json"

    def asked(self) -> dict[str, Any]:
        """Return what a record begins with: what was asked for, and what the result depends on beside that."""
        return {"kind": self.options.prune_method, "command": self.command, "request": self.flags} | self.provenance()

    def keep_record(self, result: Mapping[str, Any]) -> None:
        """Write the record of the run."""
        if is_rank_0():
            write_json(self.record_place, self.asked() | dict(result))

    def costs(self, started: float) -> dict[str, Any]:
        """Return where the run's time went and its peak memory, for its record."""
        elapsed_s = time.perf_counter() - started
        stages = {name: round(seconds, 3) for name, seconds in self.stopwatch.elapsed_s.items()}
        peak = peak_memory_gib(self.stopwatch.device)
        memory = ", ".join(f"{gib:.2f} GiB on the {place}" for place, gib in peak.items())
        logger.info("%.1f s in all; peak memory %s", elapsed_s, memory)
        return {
            "elapsed_s": round(elapsed_s, 3),
            "stages_s": stages | {"rest": round(elapsed_s - sum(stages.values()), 3)},
            "peak_memory_gib": peak,
        }


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as exits, so that temporary folders go
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup has the latter ignored
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
