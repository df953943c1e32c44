"""The pipeline from a checkpoint on disk to its scores, or to a compressed checkpoint.

A run goes on where an earlier one of the same request was stopped, and measures perplexity before and after.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from .config import RunConfig
from .core.importance import IMPORTANCE_FILE, ImportanceScores
from .core.rank_allocation import RankAllocation
from .core.rank_files import find_ranks, ranks_file, save_ranks
from .engine.checkpoint_sink import CheckpointSink
from .engine.checkpoint_source import CheckpointSource
from .engine.perplexity import Perplexity, perplexity
from .engine.storage import StatesStorage
from .errors import InputError
from .pipeline import Pipeline
from .utils.checkpoint import partial_folder
from .utils.data_utils import check_token_ids, consecutive_windows
from .utils.devices import GIB, free_host_memory, parse_device
from .utils.files import check_disk_space, check_writable, digest, temporary_folder, to_json_bytes, write_json
from .utils.layer_utils import count_parameters, dimensions_from_config, load_config, public_name
from .utils.loading import found_file, load_tokenizer
from .utils.processes import broadcast_object, is_rank_0, local_world_size, world_size
from .utils.stopwatch import stage
from .utils.text_sources import load_text

logger = logging.getLogger(__name__)


class CheckpointRun:
    """A run from a dense checkpoint to its scores, or to a compressed checkpoint.

    ``provenance`` is what a result depends on beside ``config``, as JSON takes it: ``hardware`` and ``versions``.
    No weight is read before it is needed; what cannot be used is an InputError.
    """

    def __init__(self, config: RunConfig, provenance: Mapping[str, Any]) -> None:
        self.config, self.provenance = config, provenance
        self.device = parse_device(config.device)
        model_config = load_config(config.model, config.cache_dir)
        self.dimensions = dimensions_from_config(model_config)
        self.tokenizer = load_tokenizer(config.model, cache_dir=config.cache_dir)
        self.pipeline = Pipeline(model_config, config, self.tokenizer)
        free = broadcast_object(lambda: free_host_memory() // local_world_size())  # all choose the same
        asked = config.host_memory_gib
        self.storage = StatesStorage(free if asked is None else int(asked * GIB), config.offload_folder)
        model = f"{self.dimensions.architecture} of {self.dimensions.num_layers} layers"
        windows = f"windows of {self.pipeline.seqlen} tokens"
        logger.info("%s: %s; %s; on %d x %s", config.model, model, windows, world_size(), self.device)

    @cached_property
    def source(self) -> CheckpointSource:
        """The dense model, its weights kept in memory once they are read if they take no more than half of it."""
        config, host_memory = self.config, self.storage.host_memory_bytes
        source = CheckpointSource(config.model, self.device, config.dtype, config.cache_dir, self.storage)
        own = source.fingerprint()
        if broadcast_object(lambda: own) != own:
            raise InputError(f"{config.model} has other weights here than where the first process runs")
        weights = count_parameters(source.skeleton)["total"] * source.dtype.itemsize
        source.is_kept = not config.out_of_core and weights <= host_memory / 2
        if source.is_kept:
            source.storage = StatesStorage(host_memory - weights, config.offload_folder)
        place = "in host memory" if source.is_kept else "on disk, two layers at a time in memory"
        logger.info("%.3g GiB of weights %s; %.3g GiB planned with", weights / GIB, place, host_memory / GIB)
        return source

    def score(self) -> ImportanceScores:
        """Return the importance of every layer, with what it takes to compute it again; written to its place."""
        config = self.config
        broadcast_object(lambda: check_writable(config.score_place))
        windows = self.pipeline.windows_to_score()
        found = self.pipeline.score(self.source, windows)
        scores = ImportanceScores(
            model_id=public_name(config.model),
            fingerprint=self.source.fingerprint(),
            dimensions=self.dimensions,
            dataset=public_name(config.cal_dataset),
            nsamples=len(windows),
            seqlen=self.pipeline.seqlen,
            seed=config.seed,
            scores=found.scores,
            method=config.importance_method,
            zero_rows=found.zero_rows,
            curves=found.curves,
            versions=self.provenance["versions"],
        )
        if is_rank_0():
            write_json(config.score_place / IMPORTANCE_FILE, scores)
        logger.info("importance scores are in %s", config.score_place / IMPORTANCE_FILE)
        return scores

    @contextmanager
    def output_folder(self) -> Iterator[Path]:
        """Give the folder for the compressed model: the one asked for, or a temporary one, deleted at the end."""
        if self.config.save_model is not None:
            yield self.config.save_model
            return
        with ExitStack() as stack:
            made = broadcast_object(lambda: stack.enter_context(temporary_folder(self.config.offload_folder)))
            yield made / "model"

    @contextmanager
    def compressed(self, folder: Path) -> Iterator[tuple[dict[str, Any], CheckpointSink]]:
        """Compress the model into the partial folder beside ``folder``, and measure it before and after.

        Gives what was done, for the record and the model card, and the sink to publish the model by. Whatever ends it
        before, finished layers stay to go on from.
        """
        pipeline, config = self.pipeline, self.config
        pipeline.announce_target()
        windows, test_windows = pipeline.windows_to_compress(), self._test_windows()
        self._check_disk_space(folder)
        allocation = self._allocation()
        about = {
            "base_model": config.model,
            "method": config.method,
            "sparsity_ratio": allocation.sparsity_ratio,
            "achieved_sparsity_percent": allocation.achieved_sparsity_percent,
            "rank_multiple": allocation.rank_multiple,
            "prune_qk": allocation.prune_qk,
            "dataset": config.cal_dataset,
            "nsamples": len(windows),
            "seqlen": pipeline.seqlen,
            "seed": config.seed,
        }
        names = {"base_model": config.model, "dataset": config.cal_dataset, "eval_dataset": config.eval_text}
        published = {field: public_name(name) for field, name in names.items()}  # with the model
        request = about | self._request(allocation, windows, test_windows) | published
        with CheckpointSink(folder, self.source.num_layers, request, config.overwrite).opened() as sink:
            if "dense_perplexity" not in sink.results:
                sink.remember("dense_perplexity", asdict(self._perplexity("dense", self.source, test_windows)))
            dense = Perplexity(**sink.results["dense_perplexity"])
            flat_config, layers = pipeline.compress(self.source, sink, windows, allocation)
            with stage("write"):
                generation_config = found_file(config.model, GENERATION_CONFIG_NAME, config.cache_dir)
                partial = sink.complete(self.source, flat_config, generation_config, self.tokenizer)
            about["parameters_before"] = count_parameters(self.source.skeleton)
            del self.source  # the dense model makes room
            written = CheckpointSource(partial, self.device, storage=self.storage)
            about["parameters_after"] = count_parameters(written.skeleton)
            compressed = self._perplexity("compressed", written, test_windows)
            measured = {"dataset": config.eval_text, "seqlen": dense.seqlen, "windows": dense.windows}
            about["perplexity"] = measured | {"dense": dense.value, "compressed": compressed.value}
            yield about | {"layers": [asdict(layer) for layer in layers]}, sink

    def _test_windows(self) -> Tensor:
        """Return the token windows that perplexity is measured on, (N, S)."""
        config = self.config
        with stage("data"):
            text = load_text(config.eval_text, "test", dataset_root=config.dataset_root, cache_dir=config.cache_dir)
            windows = consecutive_windows(text, self.tokenizer, self.pipeline.seqlen)
            check_token_ids(windows, self.pipeline.model_config.vocab_size)
        return windows

    def _check_disk_space(self, folder: Path) -> None:
        """Refuse a folder without room for what is still to be written of the compressed weights."""
        parameters = count_parameters(self.source.skeleton)
        removed = self.config.target_sparsity * parameters["decoder_linear"]
        needed_bytes = int(parameters["total"] - removed) * self.source.dtype.itemsize
        written_bytes = sum(path.stat().st_size for path in partial_folder(folder).glob("*.safetensors"))
        check_disk_space(folder, needed_bytes - written_bytes)

    def _allocation(self) -> RankAllocation:
        """Return the ranks that are in their place, or else score the layers, allocate, and leave both there."""
        config, pipeline, place = self.config, self.pipeline, self.config.score_place
        fingerprint = self.source.fingerprint()
        allocation = broadcast_object(
            lambda: find_ranks(place, pipeline.selector, fingerprint, config.keep_ratio, pipeline.allocate)
        )
        if allocation is None:
            logger.info("no ranks or scores in %s: scoring the layers first", place)
            scores = self.score()
            allocation = pipeline.allocate(scores.scores, scores.curves, digest(to_json_bytes(scores)))
        elif config.rank_multiple not in (None, allocation.rank_multiple):
            raise InputError(
                f"the ranks in {place} go with --rank_multiple {allocation.rank_multiple}, not {config.rank_multiple}"
            )
        ranks = place / ranks_file(allocation.sparsity_ratio)
        is_of_scores_here = allocation.importance_sha256 is not None and place.is_dir() and not ranks.exists()
        if is_rank_0() and is_of_scores_here and os.access(place, os.W_OK):
            save_ranks(replace(allocation, fingerprint=fingerprint), ranks)
        logger.info(
            "asked to remove %g %% of %d decoder-layer weights; the ranks remove %.3f %%",
            allocation.sparsity_ratio,
            allocation.parameters_before,
            allocation.achieved_sparsity_percent,
        )
        return allocation

    def _request(self, allocation: RankAllocation, windows: Tensor, test_windows: Tensor) -> dict[str, Any]:
        """Return what else decides the bytes of the result, in words where there are some, for a run that goes on."""
        return {
            **self.source.identity,
            "dtype": str(self.source.dtype),
            "ranks": digest(to_json_bytes(allocation.layers))[:16],
            "windows": digest(windows.numpy().tobytes())[:16],
            "eval_dataset": self.config.eval_text,
            "eval_windows": digest(test_windows.numpy().tobytes())[:16],
            "tol": self.config.tolerance,
            "batch_size": self.pipeline.batch_size(windows),
            "processes": world_size(),
            **self.provenance,
        }

    def _perplexity(self, which: str, source: CheckpointSource, windows: Tensor) -> Perplexity:
        measured = perplexity(source, windows, self.pipeline.batch_size(windows))
        if not math.isfinite(measured.value):
            raise InputError(f"the {which} model's perplexity is {measured.value}")
        count, seqlen = windows.shape
        logger.info("%s perplexity %.4f over %d windows of %d tokens", which, measured.value, count, seqlen)
        return measured
