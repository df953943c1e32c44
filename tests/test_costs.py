"""Counted operations, bytes and memory against those of real models, real files and real allocations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from conftest import tiny_model
from flatllmbench.costs import (
    Cost,
    Workload,
    activation_bytes,
    angles_cost,
    compressed_layers,
    compression_costs,
    cut_layers,
    dense_layers,
    forward_cost,
    hidden_state_bytes,
    moment_bytes,
    moments_cost,
    parameter_counts,
    perplexity_cost,
    solve_memory_bytes,
    solves_cost,
    statistics_cost,
)
from flatllmbench.published_models import PUBLISHED_MODELS
from flatllmbench.random_checkpoint import write_random_checkpoint
from flatllmcore.core.calibration import ModelInMemory, record_layer_arguments
from flatllmcore.core.hidden_states import HiddenStates
from flatllmcore.core.mlp_nystrom import reconstruct_down_projection, select_channels
from flatllmcore.core.moments import BLOCK, add_head_moments, add_moment, collect_moments
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import RankAllocation, ranks_from_keep_ratios
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.layer_utils import ModelDimensions, dimensions_from_config

CPU = torch.device("cpu")
S = 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
PARAMETERS = {  # as their publishers count them
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
}


def counted_operations(work: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that ``work`` held at once beyond what was there, from every allocation it made."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


def upper_half_of_attention(dimensions: ModelDimensions, ranks: list[int], tokens: int) -> float:
    """Return what the counter adds to a causal attention: it takes every query to see every key."""
    unseen = S - (S + 1) / 2
    return sum(tokens * unseen * dimensions.num_heads * 2 * (dimensions.head_dim + rank) for rank in ranks)


def allocation_of(config: PretrainedConfig, *keep: float) -> RankAllocation:
    return ranks_from_keep_ratios(dimensions_from_config(config), keep)


def compressed(model: PreTrainedModel, allocation: RankAllocation, windows: Tensor) -> PreTrainedModel:
    source = ModelInMemory(model, CPU)
    flat_config, _ = compress_layers(
        source, source, windows, allocation, batch_size=8, tolerance=0.96, stopwatch=Stopwatch(CPU)
    )
    return source.adopt(flat_config)


class TestOperations:
    """The oracle is torch's own counter on a real model with plain attention."""

    def test_a_dense_model_with_its_head(self, windows):
        model = tiny_model(attn_implementation="eager")
        dimensions, work = dimensions_from_config(model.config), Workload(len(windows), S, 5, 2)
        cost = perplexity_cost(dimensions, dense_layers(dimensions), model.config.vocab_size, work)
        unseen = upper_half_of_attention(dimensions, [dimensions.head_dim] * 2, work.tokens)
        assert counted_operations(lambda: model(windows)) == cost.operations + unseen

    def test_a_compressed_model(self, windows):
        model = tiny_model(attn_implementation="eager")
        allocation = allocation_of(model.config, 0.4, 0.7)
        model = compressed(model, allocation, windows)
        work = Workload(len(windows), S, 5, 2)
        cost = forward_cost(allocation.dimensions, compressed_layers(allocation), work)
        unseen = upper_half_of_attention(allocation.dimensions, list(allocation.value_rank), work.tokens)
        assert counted_operations(lambda: model.model(windows)) == cost.operations + unseen

    def test_statistics_with_their_moments(self, windows):
        """The counter sees both triangles of the moments of an MLP as narrow as this."""
        model = tiny_model(attn_implementation="eager")
        dimensions = dimensions_from_config(model.config)
        arguments = record_layer_arguments(model.model, S)
        states = model.get_input_embeddings()(windows)

        def run() -> None:
            for layer, passed in zip(model.model.layers, arguments, strict=True):
                with collect_moments(layer, dimensions, Stopwatch(CPU)):
                    layer(states, **passed)

        work = Workload(len(windows), S, 5, 2)
        allocation = allocation_of(model.config, 0.4, 0.7)
        cost = statistics_cost(allocation, work) + moments_cost(allocation, work)
        other_triangle = 2 * work.tokens * dimensions.intermediate_size**2
        unseen = upper_half_of_attention(dimensions, [dimensions.head_dim] * 2, work.tokens)
        assert counted_operations(run) == cost.operations + other_triangle + unseen

    def test_moments_of_a_wide_mlp_exceed_one_triangle_by_half_a_strip(self):
        F, tokens = 4 * BLOCK, 8
        config = LlamaConfig(hidden_size=64, intermediate_size=F, num_hidden_layers=1, num_attention_heads=4)
        cost = moments_cost(allocation_of(config, 0.5), Workload(1, tokens, 1, 2))
        heads = counted_operations(
            lambda: add_head_moments(torch.zeros(4, 16, 16, dtype=torch.float64), torch.ones(tokens, 64))
        )
        strips = counted_operations(lambda: add_moment(torch.zeros(F, F, dtype=torch.float64), torch.ones(tokens, F)))
        assert strips + heads == cost.operations + tokens * F * BLOCK

    def test_solves_equal_the_loops_of_their_algorithms(self):
        """Multiplications and additions of the textbook loops, counted one by one."""
        D, F, d, heads = 256, 1500, 32, 8
        config = LlamaConfig(hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=heads)
        allocation = allocation_of(config, 0.5, 1.0)  # the second layer stays whole and costs nothing
        r, k = allocation.value_rank[0], allocation.mlp_width[0]

        def cholesky(n: int) -> int:  # entry (i, j) of the factor is what j products leave of that of the matrix
            return sum(2 * j * (n - j) for j in range(n))

        def triangular_inverse(n: int) -> int:  # column j: entry i is made of the i - j entries above it
            return sum(sum(range(2, 2 * (n - j), 2)) for j in range(n))

        def triangular_solve(n: int) -> int:  # of one right-hand side
            return sum(2 * i for i in range(n))

        mlp = cholesky(F) + triangular_inverse(F) + cholesky(k) + D * 2 * triangular_solve(k) + D * k * 2 * (F - k)
        attention = 2 * heads * (r * d * D) * 2  # V and O: one product of (r, d) with (d, D) each
        assert solves_cost(allocation).operations == pytest.approx(mlp + attention, rel=3e-3)

    def test_processes_share_out_all_of_a_solve_but_the_attention(self):
        config = LlamaConfig(hidden_size=256, intermediate_size=1500, num_hidden_layers=2, num_attention_heads=8)
        allocation = allocation_of(config, 0.5, 1.0)
        one, two, three = (solves_cost(allocation, count).operations for count in (1, 2, 3))
        assert one - two == pytest.approx(3 * (two - three))
        attention = 2 * 8 * (allocation.value_rank[0] * 32 * 256) * 2
        assert one - 2 * (one - two) == pytest.approx(attention)

    def test_costs_by_stage_are_those_of_the_parts(self):
        allocation, work = allocation_of(CONFIGS["llama"], 0.5, 1.0, 0.9), Workload(7, 32, 2, 2)
        costs = compression_costs(allocation, work)
        assert costs["moments"] == moments_cost(allocation, work)
        assert costs["solves"] == solves_cost(allocation)
        compressed_forward = forward_cost(allocation.dimensions, compressed_layers(allocation), work)
        assert costs["forward"] == statistics_cost(allocation, work) + compressed_forward

    def test_whole_layers_need_no_statistics(self):
        allocation, work = allocation_of(CONFIGS["llama"], 1.0, 1.0, 1.0), Workload(7, 32, 2, 2)
        assert cut_layers(allocation) == []
        assert statistics_cost(allocation, work) == moments_cost(allocation, work) == solves_cost(allocation) == Cost()


class TestMovedBytes:
    """Each figure spelled out: 3 batches of at most 2 windows of 8 tokens, 4 bytes a number."""

    work = Workload(5, 8, 2, 4)
    allocation = allocation_of(CONFIGS["llama"], 0.5, 0.5, 1.0)
    D, F, d, states = 48, 80, 12, 4 * 5 * 8 * 48

    def test_forward_reads_weights_per_batch_and_states_once_and_writes_them(self):
        linear = 48 * (48 + 48 + 24 + 24) + 3 * 48 * 80
        cost = forward_cost(self.allocation.dimensions, [(12, 80)], self.work)
        assert cost.moved_bytes == 3 * 4 * linear + 2 * self.states

    def test_statistics_leave_out_what_comes_after_the_moments(self):
        linear = 48 * (48 + 48 + 24 + 24) + 2 * 48 * 80
        assert statistics_cost(self.allocation, self.work).moved_bytes == 2 * (3 * 4 * linear + self.states)

    def test_moments_read_activations_and_read_and_write_half_a_matrix_of_sums(self):
        assert moments_cost(self.allocation, self.work).moved_bytes == 2 * (4 * 40 * 80 + 3 * 2 * 8 * 80 * 80 / 2)

    def test_solves_read_the_moments(self):
        assert solves_cost(self.allocation).moved_bytes == 2 * 8 * (80 * 80 + 2 * 12 * 12)

    def test_angles_read_what_enters_and_what_leaves(self):
        assert angles_cost(self.allocation.dimensions, self.work).moved_bytes == 3 * 2 * self.states

    def test_the_longer_of_operations_and_bytes_is_the_bound(self):
        assert Cost(10.0, 3.0).bound_s(operations_per_s=5.0, bytes_per_s=1.0) == 3.0
        assert Cost(10.0, 3.0).bound_s(operations_per_s=2.0, bytes_per_s=1.0) == 5.0


class TestSizes:
    @pytest.mark.parametrize("name", PUBLISHED_MODELS)
    def test_published_models_have_their_published_parameters(self, name):
        assert parameter_counts(PUBLISHED_MODELS[name]()).total == PARAMETERS[name]

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_parameters_are_those_in_the_files_of_a_checkpoint(self, config, tmp_path):
        write_random_checkpoint(config, tmp_path, dtype=torch.float32, max_shard_bytes=30_000)
        sizes = stored_bytes(tmp_path)
        counts = parameter_counts(config)
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert 4 * counts.total == sum(sizes.values())
        assert 4 * counts.layer == sum(size for name, size in sizes.items() if ".layers.1." in name)
        assert 4 * counts.embedding == sizes["model.embed_tokens.weight"]
        assert 4 * counts.head == sizes.get("lm_head.weight", 0)

    def test_hidden_states_are_those_the_walk_keeps(self, windows):
        model = tiny_model()
        with torch.no_grad():
            states = HiddenStates.embed(ModelInMemory(model, CPU), windows, 5).states
        work = Workload(*windows.shape, 5, states.dtype.itemsize)
        assert hidden_state_bytes(dimensions_from_config(model.config), work) == states.nbytes

    def test_moments_are_those_the_walk_sums(self):
        model = tiny_model()
        dimensions = dimensions_from_config(model.config)
        with collect_moments(model.model.layers[0], dimensions, Stopwatch(CPU)) as moments:
            pass
        assert moment_bytes(dimensions) == moments.value.nbytes + moments.mlp.nbytes


class TestMemory:
    """Against the allocations that the code at work makes."""

    @pytest.mark.parametrize("keep", [0.3, 0.8, 0.99])
    def test_solves(self, keep):
        config = LlamaConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=8)
        allocation = allocation_of(config, keep)
        dimensions, size = allocation.dimensions, cut_layers(allocation)[0]
        activations = torch.randn(2048, 1536, dtype=torch.float64)
        C = activations.T @ activations
        down_weight = torch.randn(384, 1536)

        def solve() -> None:
            reconstruct_down_projection(down_weight, C, select_channels(C, size[1]))

        assert solve_memory_bytes(dimensions, size) == pytest.approx(C.nbytes + peak_bytes(solve), rel=0.05)

    @pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 4096), (torch.float32, 4096), (torch.float32, 256)])
    def test_a_batch_in_a_layer(self, dtype, tokens):
        config = LlamaConfig(hidden_size=256, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        dimensions = dimensions_from_config(config)
        states = torch.randn(8, tokens // 8, 256).to(dtype)
        (arguments,) = record_layer_arguments(model.model, tokens // 8)

        with collect_moments(model.model.layers[0], dimensions, Stopwatch(CPU)):
            peak = peak_bytes(lambda: model.model.layers[0](states, **arguments))
        work = Workload(8, tokens // 8, 8, dtype.itemsize)
        assert activation_bytes(dimensions, work, product_itemsize=4) == pytest.approx(peak, rel=0.1)


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of every tensor in the safetensors files of a folder, by name."""
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (not a dict)
    return sizes
