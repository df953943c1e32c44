"""The pipeline from a checkpoint on disk to its scores, or to compressed checkpoints.

A run goes on where an earlier one of the same request was stopped, and measures perplexity before and after.
"""

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from .config import RunConfig
from .core.importance import ImportanceScores
from .core.rank_allocation import RankAllocation
from .core.rank_files import find_ranks, save_ranks
from .engine.checkpoint_sink import CheckpointSink
from .engine.checkpoint_source import CheckpointSource
from .engine.perplexity import perplexity
from .engine.storage import StatesStorage
from .errors import InputError
from .methods import METHODS
from .pipeline import TO_COMPRESS, TO_SCORE, Pipeline
from .utils.checkpoint import MODEL_CARD, locked, partial_folder, read_manifest, stated_licence
from .utils.data_utils import check_token_ids, consecutive_windows
from .utils.devices import free_host_memory, parse_device
from .utils.files import GIB, check_disk_space, check_writable, digest, temporary_folder, to_json_bytes, write_json
from .utils.layer_utils import count_parameters, dimensions_from_config
from .utils.loading import found_file, load_config, load_tokenizer
from .utils.names import STOCK, public_name, public_text, ranks_file, text_names
from .utils.processes import broadcast_object, is_rank_0, local_world_size, world_size
from .utils.stopwatch import stage
from .utils.text_sources import has_test_split, load_text

logger = logging.getLogger(__name__)

_OF_RANKS = (  # in a record
    *("sparsity_ratio", "achieved_sparsity_percent", "rank_multiple", "prune_qk", "input_divisor"),
    "importance_sha256",  # of the scores, which may be of other windows
)


@dataclass(frozen=True)
class Target:
    """What removing a share comes to: ranks, what the record says of them, and all that the result depends on."""

    allocation: RankAllocation
    about: dict[str, Any]
    request: dict[str, Any]  # as JSON takes it, and without places on this machine


class CheckpointRun:
    """A run from a dense checkpoint to its scores, or to compressed checkpoints: one, or several of the same data.

    ``provenance`` is what a result depends on beside ``config``, as JSON takes it: ``hardware`` and ``versions``.
    No weight is read before it is needed; what cannot be used is an InputError.
    """

    def __init__(self, config: RunConfig, provenance: Mapping[str, Any]) -> None:
        self.config, self.provenance = config, provenance
        self.device = parse_device(config.device)
        model_config = load_config(config.model, config.cache_dir)
        self.dimensions = dimensions_from_config(model_config)
        self._dense: list[float] = []  # perplexities of the dense model, when they are measured or read
        self.tokenizer = load_tokenizer(config.model, cache_dir=config.cache_dir)
        self.pipeline = Pipeline(model_config, config, self.tokenizer)
        free = broadcast_object(lambda: free_host_memory() // local_world_size())  # all choose the same
        asked, folder = config.host_memory_gib, config.offload_folder or Path(tempfile.gettempdir())
        self.storage = StatesStorage(free if asked is None else int(asked * GIB), folder)
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
        weights = count_parameters(source.model)["total"] * source.weights_dtype.itemsize
        source.is_kept = not config.out_of_core and weights <= host_memory / 2
        if source.is_kept:
            source.storage = StatesStorage(host_memory - weights, self.storage.folder)
        place = "in host memory" if source.is_kept else "on disk, two layers at a time in memory"
        logger.info("%.3g GiB of weights %s; %.3g GiB planned with", weights / GIB, place, host_memory / GIB)
        return source

    def score(self) -> ImportanceScores:
        """Return the importance of every layer, with what it takes to compute it again; written to its place."""
        windows = self.pipeline.windows(TO_SCORE)
        with ExitStack() as stack:
            broadcast_object(lambda: self._hold_scores(stack))
            return self._scored(windows)

    def _hold_scores(self, stack: ExitStack) -> None:
        """Have the place of scores to this run, while the stack is entered; InputError if it is another's."""
        file = self.config.score_file
        check_writable(file.parent)
        stack.enter_context(locked(file.with_name(f"{file.name}.new")))  # and not of what a link there leads to
        if file.exists() and not self.config.overwrite:
            raise InputError(f"another run has just written {file}; run this again to use it")

    def _scored(self, windows: Tensor) -> ImportanceScores:
        config = self.config
        found = self.pipeline.score(self.source, windows)
        scores = ImportanceScores(
            model_id=public_name(config.model),
            fingerprint=self.source.fingerprint(),
            dimensions=self.dimensions,
            dataset=public_text(config.cal_dataset),
            nsamples=len(windows),
            seqlen=self.pipeline.seqlen,
            seed=config.seed,
            method=config.importance_method,
            **vars(found),
            versions=self.provenance["versions"],
        )
        if is_rank_0():
            write_json(config.score_file, scores)
        logger.info("importance scores are in %s", config.score_file)
        return scores

    def prepare(self, configs: Sequence[RunConfig], published: Sequence[RunConfig] = ()) -> list[Target]:
        """Return what is to be compressed, once nothing speaks against any of it.

        All differ from the run's own config in the share removed and in the folder alone. Refused are ``configs`` that
        cannot be met, or whose partial folder is of another request, and models ``published`` of another.
        """
        self.pipeline.check_method()
        for config in configs:
            place = config.score_place
            if not (place.is_file() or (place / ranks_file(100 * config.target_sparsity)).is_file()):
                self.pipeline.check_target(config.keep_ratio)  # ranks there may be of other multiples
        with stage("data"):
            data = {"windows": _digest(self.windows), "eval_windows": list(map(_digest, self.test_windows.values()))}
        self._check_disk_space(configs)
        targets = [self._target(config.keep_ratio, data) for config in (*configs, *published)]
        folders = [config.save_model and partial_folder(config.save_model) for config in configs]
        for target, folder in zip(targets, [*folders, *(config.save_model for config in published)], strict=True):
            if folder is not None:
                broadcast_object(partial(read_manifest, folder, target.request))
        return targets[: len(configs)]

    @cached_property
    def windows(self) -> Tensor:
        """The token windows that layers are compressed on, (N, S)."""
        return self.pipeline.windows(TO_COMPRESS)

    @cached_property
    def test_windows(self) -> dict[str, Tensor]:
        """The token windows of each text that perplexity is measured on, (N, S)."""
        config, found = self.config, {}
        for name in config.eval_texts:
            places = {"dataset_root": config.dataset_root, "cache_dir": config.cache_dir}
            text = load_text(name, "test", **places, tokenizer=self.tokenizer)
            if name in text_names(config.cal_dataset) and not has_test_split(name, config.dataset_root):
                logger.warning("%s keeps no test split apart: its perplexity is of text calibrated on", name)
            found[name] = consecutive_windows(text, self.tokenizer, self.pipeline.seqlen, config.eval_nsamples)
            check_token_ids(found[name], self.pipeline.model_config.vocab_size)
        return found

    @contextmanager
    def output_folder(self, save_model: Path | None) -> Iterator[Path]:
        """Give the folder for a compressed model: the one asked for, or a temporary one, deleted at the end."""
        lent = temporary_folder(self.storage.folder)
        with ExitStack() as stack:
            yield save_model or broadcast_object(lambda: stack.enter_context(lent)) / "model"

    @contextmanager
    def compressed(self, target: Target, folder: Path) -> Iterator[tuple[dict[str, Any], CheckpointSink]]:
        """Compress the model into the partial folder beside ``folder``, and measure it before and after.

        Gives what was done, for the record and the model card, and the sink to publish the model by. Whatever ends it
        before, finished layers stay to go on from.
        """
        config, about = self.config, dict(target.about)
        with CheckpointSink(folder, self.source.num_layers, target.request, config.overwrite).opened() as sink:
            dense = sink.results.get("dense_perplexities") or self._dense or self._perplexities("dense", self.source)
            self._dense = dense
            sink.remember("dense_perplexities", dense)
            flat_config, layers = self.pipeline.compress(self.source, sink, self.windows, target.allocation)
            with stage("write"):
                generation_config = found_file(config.model, GENERATION_CONFIG_NAME, config.cache_dir)
                complete = sink.complete(self.source, flat_config, generation_config, self.tokenizer)
            written = CheckpointSource(complete, self.device, storage=self.source.storage)
            about["parameters_before"] = count_parameters(self.source.model)
            about["parameters_after"] = count_parameters(written.model)
            measured = self.test_windows.items(), dense, self._perplexities("compressed", written)
            about["perplexity"] = [
                {"dataset": name, "seqlen": of.shape[1], "windows": len(of), "dense": before, "compressed": after}
                for (name, of), before, after in zip(*measured, strict=True)
            ]
            yield about | {"layers": [asdict(layer) for layer in layers]}, sink

    def _check_disk_space(self, configs: Sequence[RunConfig]) -> None:
        """Refuse a place without room for what is still to be written of the compressed weights."""
        parameters, needed_bytes = count_parameters(self.source.model), []
        for config in configs:
            removed = config.target_sparsity * parameters["decoder_linear"]
            written = partial_folder(config.save_model).glob("*.safetensors") if config.save_model else ()
            needed = int(parameters["total"] - removed) * self.source.weights_dtype.itemsize
            needed_bytes.append(needed - sum(path.stat().st_size for path in written))
        if place := self.config.save_model:
            check_disk_space(place, sum(needed_bytes))
        else:  # one at a time
            check_disk_space(self.storage.folder, max(needed_bytes))

    def _target(self, keep_ratio: float, data: dict[str, Any]) -> Target:
        """Return what removing a share comes to; ``data`` are digests of the windows."""
        config = self.config
        ranked = self.pipeline.selector.stock if config.shape == STOCK else self._ranked
        allocation = ranked(keep_ratio)
        found = allocation.sparsity_ratio, allocation.parameters_before, allocation.achieved_sparsity_percent
        logger.info("asked to remove %g %% of %d decoder-layer weights; the ranks remove %.3f %%", *found)
        by = allocation.importance_method
        about = {name: getattr(config, name) for name in ("method", "shape", "seed")}
        about |= {name: getattr(allocation, name) for name in _OF_RANKS} | {
            "base_model": config.model,
            "importance_method": None if by == METHODS[config.method].importance_method else by,
            "dataset": config.cal_dataset,
            "nsamples": len(self.windows),
            "seqlen": self.pipeline.seqlen,
            "gradient_nsamples": min(config.gradient_nsamples, len(self.windows)),
            "rounded_to": getattr(self.pipeline.model_config, "rounded_to", None),
            "licence": stated_licence(found_file(config.model, MODEL_CARD, config.cache_dir)),
        }
        depends_on = {
            **self.source.identity,
            "attention": self.source.config._attn_implementation,
            "dtype": " in ".join(dict.fromkeys(map(str, (self.source.weights_dtype, self.source.dtype)))),
            "ranks": digest(to_json_bytes(allocation.layers))[:16],
            "tol": config.tolerance,
            "batch_size": self.pipeline.batch_size(self.windows),
            "processes": world_size(),
            **self.provenance,
        }
        published = {
            "base_model": public_name(config.model),
            "dataset": public_text(config.cal_dataset),
            "eval_dataset": list(map(public_name, config.eval_texts)),
        }
        return Target(allocation, about, about | depends_on | data | published)

    def _ranked(self, keep_ratio: float) -> RankAllocation:
        """Return the ranks that are in their place, or else score the layers, allocate, and leave both there."""
        pipeline, place = self.pipeline, self.config.score_place
        fingerprint, allocate = self.source.fingerprint(), partial(self.pipeline.allocate, keep_ratio)
        allocation = broadcast_object(lambda: find_ranks(place, pipeline.selector, fingerprint, keep_ratio, allocate))
        if allocation is None:
            logger.info("no ranks or scores in %s: scoring the layers first", place)
            scores = self.score()
            allocation = allocate(scores.scores, scores.curves_in_nats, digest(to_json_bytes(scores)))
        else:
            self._check_found(allocation)
        ranks = place / ranks_file(allocation.sparsity_ratio)
        is_of_scores_here = allocation.importance_sha256 is not None and place.is_dir() and not ranks.exists()
        if is_rank_0() and is_of_scores_here and os.access(place, os.W_OK):
            save_ranks(replace(allocation, fingerprint=fingerprint), ranks)
        return allocation

    def _check_found(self, allocation: RankAllocation) -> None:
        """Refuse ranks found that do not go with the multiples asked for, or by what was asked for."""
        config, multiple = self.config, self.pipeline.selector.rank_multiple
        narrowed = (width for width in allocation.per_layer("mlp_width") if width < self.dimensions.intermediate_size)
        if (config.rank_multiple or config.width_multiple) and allocation.rank_multiple != multiple:
            problem = f"go with --rank_multiple {allocation.rank_multiple}, not {multiple}"
        elif config.width_multiple and any(width % config.width_multiple for width in narrowed):
            problem = f"do not go with --width_multiple {config.width_multiple}"
        elif allocation.importance_method not in (None, config.importance_method):
            problem = f"go by {allocation.importance_method}, not {config.importance_method}; give another --bi_score"
        else:
            return
        raise InputError(f"the ranks in {config.score_place} {problem}")

    def _perplexities(self, which: str, source: CheckpointSource) -> list[float]:
        found = []
        for name, windows in self.test_windows.items():
            found.append(perplexity(source, windows, self.pipeline.batch_size(windows)))
            if not math.isfinite(found[-1]):
                raise InputError(f"the {which} model's perplexity is {found[-1]} on {name}")
            logger.info("%s perplexity %.4f on %s, %d windows of %d tokens", which, found[-1], name, *windows.shape)
        return found


def _digest(windows: Tensor) -> str:
    return digest(windows.numpy().tobytes())[:16]
