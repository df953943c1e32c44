"""What both stages of `main.py` need before they begin: checked, measured against the machine, and said."""

import argparse
import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from flatllmcore.core.calibration import LayerSource, ModelInMemory, default_batch_size
from flatllmcore.core.checkpoint_source import CheckpointSource
from flatllmcore.core.hidden_states import StatesStorage
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.errors import InputError
from flatllmcore.utils.calibration_windows import window_length
from flatllmcore.utils.checkpoint import count_parameters
from flatllmcore.utils.devices import GIB, free_host_memory, parse_device
from flatllmcore.utils.layer_utils import dimensions_from_config, load_config
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.processes import local_process_count, process_count, told_by_first

logger = logging.getLogger(__name__)

SHARE_OF_HOST_FOR_WEIGHTS = 0.5


class Setup:
    """Device, window length, tokenizer, the dense model's sizes and a stopwatch.

    Everything that can be refused is checked before any weight is read; the checkpoint, which a hub id downloads, is
    first looked at when it is needed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = parse_device(args.device)
        if not Path(args.model).is_dir():
            logger.info("there is no folder %s; asking the Hugging Face Hub for it", args.model)
        config = load_config(args.model, args.cache_dir)
        self.dimensions = dimensions_from_config(config)
        self.vocab_size = config.vocab_size
        self.seqlen = window_length(args.seqlen, config.max_position_embeddings)
        self.batch_size = args.batch_size or default_batch_size(self.seqlen)
        self.selector = ImportancePreservingRankSelector(
            self.dimensions, rank_multiple=args.rank_multiple, prune_qk=args.prune_qk
        )
        self.stopwatch = Stopwatch(self.device)
        self.tokenizer = load_tokenizer(args.model, cache_dir=args.cache_dir)
        free = told_by_first(lambda: free_host_memory() // local_process_count())  # all choose the same
        self.storage = StatesStorage(
            free if args.host_memory_gib is None else int(args.host_memory_gib * GIB), args.offload_folder
        )
        logger.info(
            "%s: %s of %d layers; windows of %d tokens; on %s%s",
            args.model,
            self.dimensions.architecture,
            self.dimensions.num_layers,
            self.seqlen,
            self.device,
            f" and {process_count() - 1} more" if process_count() > 1 else "",
        )

    @cached_property
    def checkpoint(self) -> CheckpointSource:
        """The dense model on disk, its weights looked through."""
        return CheckpointSource(self.args.model, self.device, self.args.dtype, self.args.cache_dir, self.storage)

    @cached_property
    def parameters(self) -> dict[str, int]:
        return count_parameters(self.checkpoint.skeleton)

    def load_source(self, nsamples: int) -> LayerSource:
        """Log the plan, and return the model: in host memory if it takes no more than half of it, else on disk.

        Args:
            nsamples: The most windows that will run at a time, for the plan.
        """
        own = self.checkpoint.fingerprint()
        if told_by_first(lambda: own) != own:
            raise InputError(f"{self.args.model} has other weights here than where the first process runs")
        weights = self.parameters["total"] * self.checkpoint.dtype.itemsize
        is_too_large = weights > SHARE_OF_HOST_FOR_WEIGHTS * self.storage.host_memory()
        out_of_core = self.args.out_of_core or is_too_large
        logger.info("plan: %s", self._plan(weights, out_of_core, nsamples))
        if out_of_core:
            return self.checkpoint
        with self.stopwatch.stage("load"):
            model = load_model(self.args.model, dtype=self.args.dtype, cache_dir=self.args.cache_dir)
        left = replace(self.storage, host_memory_bytes=self.storage.host_memory() - weights)
        return ModelInMemory(model, self.device, left)

    def _plan(self, weights: int, out_of_core: bool, nsamples: int) -> str:
        dimensions = self.dimensions
        own_share = -(-nsamples // process_count())
        states = own_share * self.seqlen * dimensions.hidden_size * self.checkpoint.dtype.itemsize
        layer = dimensions.layer_parameters * self.checkpoint.dtype.itemsize
        moments = 8 * (dimensions.intermediate_size**2 + dimensions.num_kv_heads * dimensions.head_dim**2)
        held = f"read from disk, layer by layer, two of {_gib(layer)} at a time" if out_of_core else "in host memory"
        place = {"device": f"on {self.device}", "host": "in host memory", "file": "in a file"}
        storage = self.storage
        if not out_of_core:
            storage = replace(storage, host_memory_bytes=storage.host_memory() - weights)
        return (
            f"{_gib(weights)} of weights {held} ({_gib(self.storage.host_memory())} of it planned with); "
            f"{_gib(states)} of hidden states {place[storage.place(states, self.device)]}; "
            f"{_gib(moments)} of moments on {self.device}, up to three times that while the MLP is solved"
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
