"""A whole run planned from a config: what each step computes, moves, holds, and how long that takes at least."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from flatllmcore.core.hidden_states import states_place
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.utils.devices import GIB
from flatllmcore.utils.layer_utils import ModelDimensions, dimensions_from_config

from .costs import (
    FLOAT32_BYTES,
    FLOAT64_BYTES,
    NO_COST,
    Cost,
    LayerSize,
    ParameterCounts,
    Workload,
    activation_bytes,
    angles_cost,
    compressed_layers,
    compression_costs,
    cut_layers,
    dense_layers,
    forward_cost,
    hidden_state_bytes,
    layer_weights,
    moment_bytes,
    parameter_counts,
    perplexity_cost,
    solve_memory_bytes,
)
from .machines import Machine
from .perplexity import LOGIT_ROWS
from .setup import SHARE_OF_HOST_FOR_WEIGHTS


@dataclass(frozen=True)
class Request:
    """What a run of ``main.py`` is asked for.

    Attributes:
        importance_nsamples: 0 where the scores are there.
        eval_windows: Windows of text that perplexity is measured on, dense and compressed.
        processes: They share out the windows, each with a device of its own, all on one host.
        out_of_core: Whether weights are read layer by layer though they may fit in host memory.
    """

    config: PretrainedConfig
    sparsity_ratio: float
    nsamples: int
    importance_nsamples: int
    eval_windows: int
    seqlen: int
    batch_size: int
    itemsize: int
    processes: int = 1
    out_of_core: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of a step, for the process that has most to do.

    Attributes:
        step: Steps come one after another: ``load``, ``importance``, ``compression``, ...
        name: What is done in it.
        rate: Name of the stage of a run's record whose rate tells this one's.
        cost: Computed on the device.
        copied_bytes: Between host and device.
        linked_bytes: Between devices.
        disk_bytes: Read or written; files that all processes read count once.
    """

    step: str
    name: str
    rate: str
    cost: Cost = NO_COST
    copied_bytes: float = 0.0
    linked_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass(frozen=True)
class Seconds:
    """How long the four kinds of work of a stage or a step take."""

    compute: float = 0.0
    copy: float = 0.0
    link: float = 0.0
    disk: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Seconds(*(a + b for a, b in pairs))

    @property
    def one_after_another(self) -> float:
        return sum(vars(self).values())

    @property
    def overlapped(self) -> float:
        """What is left when copies and files take no time of their own behind the computing, or it behind them."""
        return max(self.compute, self.copy, self.disk) + self.link


class Plan:
    """What a run of one request on one machine takes.

    Args:
        request: What is asked for.
        machine: Where.
        efficiency: Share of the bound's rate that is reached, by :attr:`Stage.rate`; 1, the bound, where not given.
    """

    def __init__(self, request: Request, machine: Machine, efficiency: Mapping[str, float] | None = None) -> None:
        self.request = request
        self.machine = machine
        self.efficiency = efficiency or {}
        self.dimensions: ModelDimensions = dimensions_from_config(request.config)
        self.allocation: RankAllocation = ImportancePreservingRankSelector(self.dimensions).allocate(
            [1.0] * self.dimensions.num_layers, request.sparsity_ratio
        )
        self.counts: ParameterCounts = parameter_counts(request.config)
        self.dense = dense_layers(self.dimensions)
        self.compressed = compressed_layers(self.allocation)

    @property
    def dense_bytes(self) -> int:
        return self.request.itemsize * self.counts.total

    @property
    def compressed_bytes(self) -> int:
        removed = self.allocation.parameters_before - self.allocation.parameters_after
        return self.dense_bytes - self.request.itemsize * removed

    @property
    def is_in_memory(self) -> bool:
        """Whether every process holds the dense model in host memory, rather than read it layer by layer."""
        own_memory = self._own_host_memory()
        return not self.request.out_of_core and self.dense_bytes <= SHARE_OF_HOST_FOR_WEIGHTS * own_memory

    def _own_host_memory(self) -> float:
        return self.machine.host_memory_gib * GIB / self.request.processes

    def work(self, windows: int) -> Workload:
        """Return the largest share of ``windows``, which one process takes."""
        share = -(-windows // self.request.processes)
        return Workload(share, self.request.seqlen, self.request.batch_size, self.request.itemsize)

    def states_place(self, windows: int) -> str:
        """Return where the hidden states of ``windows`` live: ``device``, ``host`` or ``file``."""
        size = hidden_state_bytes(self.dimensions, self.work(windows))
        device_memory = (self.machine.memory_gib or 0) * GIB
        left = self._own_host_memory() - (self.dense_bytes if self.is_in_memory else 0)
        return states_place(size, device_memory, left)

    def stages(self) -> list[Stage]:
        """Return all that takes time, in order."""
        request, dimensions = self.request, self.dimensions
        stages = [Stage("load", "weights", "load", disk_bytes=self.dense_bytes)] if self.is_in_memory else []
        if request.importance_nsamples:
            work = self.work(request.importance_nsamples)
            stages += [
                Stage("importance", "forward", "forward", forward_cost(dimensions, self.dense, work)),
                Stage("importance", "angles", "angles", angles_cost(dimensions, work)),
                self._weights("importance", self.dense_bytes, is_read=not self.is_in_memory),
                self._states("importance", request.importance_nsamples, 2 * len(self.dense)),
            ]
        stages += self._perplexity("dense perplexity", self.dense, self.dense_bytes, is_read=not self.is_in_memory)
        costs = compression_costs(self.allocation, self.work(request.nsamples), request.processes)
        passes = 2 * len(self.dense) + len(cut_layers(self.allocation))
        stages += [Stage("compression", name, name, cost) for name, cost in costs.items()]
        if request.processes > 1:
            stages.append(
                Stage("compression", "moments and weights, sent", "reduce", linked_bytes=self._linked_bytes())
            )
        stages += [
            self._weights("compression", self.dense_bytes, is_read=not self.is_in_memory),
            self._states("compression", request.nsamples, passes),
            Stage("compression", "compressed weights, written", "write", disk_bytes=self.compressed_bytes),
        ]
        stages += self._perplexity("compressed perplexity", self.compressed, self.compressed_bytes, is_read=True)
        return [stage for stage in stages if self.seconds(stage).one_after_another]

    def seconds(self, stage: Stage) -> Seconds:
        machine, efficiency = self.machine, self.efficiency.get(stage.rate, 1.0)
        tflops = {"moments": machine.moments_tflops, "solves": machine.float64_tflops}.get(stage.rate, machine.tflops)
        return Seconds(
            compute=stage.cost.bound_s(tflops * 1e12, machine.bandwidth_gbytes_per_s * 1e9) / efficiency,
            copy=stage.copied_bytes / (machine.host_link_gbytes_per_s * 1e9),
            link=stage.linked_bytes / (machine.link_gbytes_per_s * 1e9),
            disk=stage.disk_bytes / (machine.disk_gbytes_per_s * 1e9) / efficiency,
        )

    def steps(self) -> dict[str, Seconds]:
        """Return the time of each step, in order."""
        steps: dict[str, Seconds] = {}
        for stage in self.stages():
            steps[stage.step] = steps.get(stage.step, Seconds()) + self.seconds(stage)
        return steps

    def device_bytes(self) -> dict[str, int]:
        """Return the memory of one device by what takes it; nothing where the host is the device."""
        if self.machine.memory_gib is None:
            return {}
        layers = self.request.itemsize * (self.counts.layer + self._compressed_layer())
        parts = {"a dense and a compressed layer": layers, "solves, a batch or the head": self._computing_bytes()}
        if self.states_place(self._most_windows()) == "device":
            parts["hidden states"] = self._states_bytes()
        return parts

    def host_bytes(self) -> dict[str, int]:
        """Return the memory of the host by what takes it, beside Python and its libraries; of all processes."""
        request = self.request
        # One layer is at work, one is read ahead and one to be written; embeddings and head are there by themselves.
        layers = max(2 * self.counts.layer + self._compressed_layer(), self.counts.embedding, self.counts.head)
        parts = {"three layers": request.itemsize * layers}
        if self.is_in_memory:
            parts = {"the model": self.dense_bytes, "a compressed layer": request.itemsize * self._compressed_layer()}
        if self.machine.memory_gib is None:
            parts["solves, a batch or the head"] = self._computing_bytes()
        if self.states_place(self._most_windows()) == "host":
            parts["hidden states"] = self._states_bytes()
        return {name: request.processes * size for name, size in parts.items()}

    def _computing_bytes(self) -> int:
        """Return the memory of what a process computes at a time, beside weights and hidden states."""
        request, dimensions = self.request, self.dimensions
        product_itemsize = FLOAT32_BYTES if self.machine.memory_gib is None else request.itemsize
        batch = activation_bytes(dimensions, self.work(request.nsamples), product_itemsize)
        solves = [solve_memory_bytes(dimensions, size) for size in cut_layers(self.allocation)]
        vocab_size = request.config.vocab_size
        head = request.itemsize * dimensions.hidden_size * vocab_size
        logits = LOGIT_ROWS * vocab_size * (request.itemsize + 3 * FLOAT32_BYTES)
        return max(moment_bytes(dimensions) + batch, *solves, head + logits)

    def _most_windows(self) -> int:
        return max(self.request.nsamples, self.request.importance_nsamples, self.request.eval_windows)

    def _states_bytes(self) -> int:
        return hidden_state_bytes(self.dimensions, self.work(self._most_windows()))

    def _compressed_layer(self) -> int:
        return max(map(self._layer_weights, self.compressed))

    def _layer_weights(self, size: LayerSize) -> int:
        return layer_weights(self.dimensions, size)

    def _perplexity(self, step: str, layers: list[LayerSize], weight_bytes: int, *, is_read: bool) -> list[Stage]:
        windows = self.request.eval_windows
        if not windows:
            return []
        cost = perplexity_cost(self.dimensions, layers, self.request.config.vocab_size, self.work(windows))
        return [
            Stage(step, "forward", "perplexity", cost),
            self._weights(step, weight_bytes, is_read=is_read),
            self._states(step, windows, 2 * len(layers)),
        ]

    def _weights(self, step: str, weight_bytes: int, *, is_read: bool) -> Stage:
        """Return the way of a model's weights to the device, from files or from host memory."""
        copied = 0 if self.machine.memory_gib is None else weight_bytes
        return Stage(step, "weights", "read", copied_bytes=copied, disk_bytes=weight_bytes if is_read else 0)

    def _states(self, step: str, windows: int, passes: int) -> Stage:
        size = passes * hidden_state_bytes(self.dimensions, self.work(windows))
        place = self.states_place(windows)
        copied = size if place != "device" and self.machine.memory_gib is not None else 0
        in_files = self.request.processes * size if place == "file" else 0
        return Stage(step, f"hidden states ({place})", "states", copied_bytes=copied, disk_bytes=in_files)

    def _linked_bytes(self) -> float:
        """Return what one process sends: a ring's share of the sums (moments, down_proj); factors, V and O whole."""
        processes, dimensions, itemsize = self.request.processes, self.dimensions, self.request.itemsize
        sent = 0.0
        for rank, width in cut_layers(self.allocation):
            summed = moment_bytes(dimensions) + itemsize * width * dimensions.hidden_size
            panels = FLOAT64_BYTES * (dimensions.intermediate_size**2 + width**2) / 2
            sent += 2 * (processes - 1) / processes * summed + panels + itemsize * rank * dimensions.rank_parameters
        return sent
