"""Shares, ranks and widths that IPRS allots, against plain arithmetic and a brute-force search."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common import PUBLISHED as PUBLISHED_MODELS
from conftest import ranks_of, widths_of
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation, allocate_keep_ratios
from flatllmcore.core.rank_files import load_ranks, save_ranks
from flatllmcore.core.rank_rounding import _width_step as width_step
from flatllmcore.core.rank_rounding import largest_remainder
from flatllmcore.errors import InputError
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.layer_utils import dimensions_from_config

NAMES = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "mistral-7b")
PUBLISHED = [dimensions_from_config(PUBLISHED_MODELS[name]()) for name in NAMES]
TINY = ModelDimensions("llama", 5, 64, 8, 4, 8, 172)
NARROW = [  # the test models of conftest.py, the embedded model, SmolLM2's width in heads of 32
    ModelDimensions("llama", 2, 32, 4, 2, 12, 56),
    ModelDimensions("llama", 8, 192, 6, 2, 32, 448),
    ModelDimensions("llama", 30, 576, 18, 6, 32, 1536),
]

score_lists = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=40)
keep_ratios = st.floats(0.01, 1.0)


@st.composite
def model_dimensions(draw):
    """Return sizes of small models, widths that no step divides included."""
    kv_heads, group_size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return ModelDimensions(
        architecture="llama",
        num_layers=draw(st.integers(1, 12)),
        hidden_size=draw(st.integers(8, 512)),
        num_heads=kv_heads * group_size,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 12, 16, 24, 32, 64, 80, 100, 128])),
        intermediate_size=draw(st.one_of(st.integers(16, 2048), st.integers(2048, 32768))),
    )


def scores_for(dimensions: ModelDimensions, seed: int) -> list[float]:
    """Return a U-shaped run of scores in the published range, wobbling with ``seed``."""
    middle = (dimensions.num_layers - 1) / 2 or 1
    return [0.06 + 0.2 * abs((i - middle) / middle) + 0.01 * ((i * 7 + seed) % 5) for i in range(dimensions.num_layers)]


def counted_parameters(allocation: RankAllocation) -> int:
    """Count the weights from the shapes of the matrices themselves."""
    sizes = allocation.dimensions
    total = 0
    for r, k in zip(ranks_of(allocation), widths_of(allocation), strict=True):
        shapes = [(sizes.num_kv_heads * r, sizes.hidden_size), (sizes.hidden_size, sizes.num_heads * r)]
        shapes += [(k, sizes.hidden_size), (k, sizes.hidden_size), (sizes.hidden_size, k)]
        for heads in (sizes.num_heads, sizes.num_kv_heads):
            whole = [(heads * sizes.head_dim, sizes.hidden_size)]
            factors = [(r, sizes.hidden_size), (sizes.head_dim, r)] * heads
            is_factored = allocation.prune_qk and weights(factors) < weights(whole)
            shapes += factors if is_factored else whole
        total += weights(shapes)
    return total


def weights(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def allowed_error(dimensions: ModelDimensions, removed: float, multiple: int) -> float:
    """Return 0.1 % of what is to be removed, or one step of the smaller kind where that is more."""
    heads = dimensions.num_heads + dimensions.num_kv_heads
    rank_step = multiple * heads * dimensions.hidden_size
    wide = 64 * 3 * dimensions.hidden_size
    is_wide = 64 % multiple == 0 and wide < 0.005 * dimensions.layer_parameters
    return max(0.001 * removed, min(rank_step, wide if is_wide else multiple * 3 * dimensions.hidden_size))


class TestKeepRatios:
    @given(score_lists, keep_ratios)
    def test_shares_average_to_the_keep_ratio_and_stay_within_bounds(self, scores, keep_ratio):
        keep = allocate_keep_ratios(scores, keep_ratio)
        assert math.fsum(keep) == pytest.approx(len(scores) * keep_ratio, rel=1e-12)
        assert all(0 < w <= 1 for w in keep)

    @given(score_lists, keep_ratios)
    def test_shares_keep_the_order_of_scores(self, scores, keep_ratio):
        pairs = sorted(zip(scores, allocate_keep_ratios(scores, keep_ratio), strict=True))
        assert all(w <= later for (_, w), (_, later) in pairwise(pairs))

    @given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40))
    def test_nothing_removed_is_a_share_of_exactly_1(self, scores):
        assert allocate_keep_ratios(scores, 1.0) == [1.0] * len(scores)

    @given(st.floats(1e-300, 1e300), st.integers(1, 100), keep_ratios)
    def test_equal_scores_get_equal_shares(self, score, num_layers, keep_ratio):
        assert allocate_keep_ratios([score] * num_layers, keep_ratio) == pytest.approx([keep_ratio] * num_layers)

    @given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12), st.integers(1, 99))
    def test_shares_equal_capping_all_at_once_in_exact_fractions(self, scores, percent):
        """The oracle is the published loop: cap every share above 1, share the rest anew, repeat."""
        exact, keep_ratio = [Fraction(s) for s in scores], Fraction(percent / 100)
        shares, budget, active = [Fraction(1)] * len(scores), len(scores) * keep_ratio, set(range(len(scores)))
        while active:
            total = sum(exact[i] for i in active)
            capped = {i for i in active if exact[i] / total * budget > 1}
            if not capped:
                for i in active:
                    shares[i] = exact[i] / total * budget
                break
            budget, active = budget - len(capped), active - capped
        assert allocate_keep_ratios(scores, percent / 100) == pytest.approx([float(w) for w in shares], rel=1e-9)

    @pytest.mark.parametrize("scores", [[1.0, 1e-17], [0.1, 0.1, 0.1, 1e-300, 1e-300, 1e-300]])
    def test_a_vanishing_score_keeps_a_share_above_zero(self, scores):
        keep = allocate_keep_ratios(scores, 0.5)
        assert all(0 < w <= 1 for w in keep)

    @pytest.mark.parametrize("score", [0.0, -0.1, math.nan, math.inf])
    def test_a_score_that_is_not_positive_and_finite_is_refused_with_its_layer(self, score):
        with pytest.raises(InputError, match=r"layer 1 is .*more than 0"):
            allocate_keep_ratios([0.1, score, 0.2], 0.5)


class TestBudget:
    @pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-13b"])
    def test_llama_2_keeps_the_published_percentages(self, name):
        assert self.percentages(name) == [88, 76, 64, 52, 40]

    @pytest.mark.parametrize("name", ["llama-3-8b", "mistral-7b"])
    def test_llama_3_and_mistral_keep_the_published_percentages(self, name):
        assert self.percentages(name) == [88, 77, 66, 55, 44]

    @staticmethod
    def percentages(name: str) -> list[int]:
        dimensions = dimensions_from_config(PUBLISHED_MODELS[name]())
        return [
            int(100 * ImportancePreservingRankSelector(dimensions).prunable_keep_ratio(1 - p / 100))
            for p in (10, 20, 30, 40, 50)
        ]

    def test_pruned_q_and_k_leave_the_keep_ratio_as_it_is(self):
        assert ImportancePreservingRankSelector(TINY, prune_qk=True).prunable_keep_ratio(0.3) == pytest.approx(0.3)

    @pytest.mark.parametrize("dimensions", [*PUBLISHED, TINY])
    def test_the_largest_target_that_the_error_names_is_possible_and_the_next_is_not(self, dimensions):
        with pytest.raises(InputError, match="largest possible target is") as caught:
            ImportancePreservingRankSelector(dimensions).prunable_keep_ratio(0.0)
        largest = int(str(caught.value).split()[-2])
        assert ImportancePreservingRankSelector(dimensions).prunable_keep_ratio(1 - largest / 100) > 0
        with pytest.raises(InputError):
            ImportancePreservingRankSelector(dimensions).prunable_keep_ratio(1 - (largest + 1) / 100)

    @pytest.mark.parametrize(
        ("dimensions", "floors", "multiples"),
        list(zip(PUBLISHED, (83, 83, 91, 90, 90), (82, 82, 90, 89, 89), strict=True)),
    )
    def test_the_most_that_can_be_removed_from_published_models(self, dimensions, floors, multiples):
        """With Q and K whole by the published floors and in multiples of 8; with Q and K pruned 90 % is no limit."""
        for rank_multiple, most in ((1, floors), (8, multiples)):
            found = select(dimensions, most, rank_multiple=rank_multiple).achieved_sparsity_percent
            assert found == pytest.approx(most, abs=0.1)
            with pytest.raises(InputError, match=r"largest possible target is|they can remove"):
                select(dimensions, most + 1, rank_multiple=rank_multiple)
        assert select(dimensions, 90, prune_qk=True).achieved_sparsity_percent == pytest.approx(90, abs=0.1)


class TestPublishedFloors:
    def test_seven_tenths_of_ten_is_seven(self):
        selector = ImportancePreservingRankSelector(replace(TINY, head_dim=100, intermediate_size=10))
        assert math.floor(0.29 * 100) == 28  # what the guard is for
        assert [(kept.value_rank, kept.mlp_width) for kept in map(selector.floored, (0.29, 0.7))] == [(29, 2), (70, 7)]

    @given(st.integers(1, 1000), st.integers(1, 1000), model_dimensions())
    def test_ranks_and_widths_are_exact_floors_and_at_least_one(self, n, of_values, dimensions):
        kept = ImportancePreservingRankSelector(dimensions).floored(n / 1000, of_values / 1000)
        assert kept.value_rank == max(1, of_values * dimensions.head_dim // 1000)
        assert kept.mlp_width == max(1, n * dimensions.intermediate_size // 1000)

    @pytest.mark.parametrize("dimensions", [*PUBLISHED, TINY])
    def test_at_a_multiple_of_1_ranks_are_the_floors_of_the_shares_where_q_and_k_stay_whole(self, dimensions):
        """Oracle: r = ⌊w·d⌋ and k = ⌊w·F⌋ as published."""
        allocation = select(dimensions, 23, rank_multiple=1)
        d, F = dimensions.head_dim, dimensions.intermediate_size
        assert ranks_of(allocation) == tuple(int(kept.keep * d) for kept in allocation.layers)
        assert widths_of(allocation) == tuple(int(kept.keep * F) for kept in allocation.layers)

    def test_floors_remove_at_least_the_target(self):
        for percent in range(1, 80):
            allocation = select(PUBLISHED[0], percent, rank_multiple=1)
            assert percent - 1e-9 <= allocation.achieved_sparsity_percent < percent + 1

    def test_given_shares_state_what_their_floors_remove(self):
        allocation = floors_of([0.9, 0.5, 1.0, 0.25, 0.8])
        assert (ranks_of(allocation), widths_of(allocation)) == ((7, 4, 8, 2, 6), (154, 86, 172, 43, 137))
        removed = 1 - counted_parameters(allocation) / allocation.parameters_before
        assert allocation.achieved_sparsity_percent == pytest.approx(100 * removed)
        assert allocation.sparsity_percent == pytest.approx(100 * removed)


def floors_of(keep, prune_qk: bool = False) -> RankAllocation:
    selector = ImportancePreservingRankSelector(TINY, prune_qk=prune_qk)
    return RankAllocation.of_layers(TINY, map(selector.floored, keep), prune_qk=prune_qk)


def select(dimensions: ModelDimensions, percent: float, seed: int = 0, **options) -> RankAllocation:
    return ImportancePreservingRankSelector(dimensions, **options).allocate(
        scores_for(dimensions, seed), 1 - percent / 100
    )


class TestRoundedRanks:
    def check(self, allocation: RankAllocation, scores: list[float]) -> None:
        """Check bounds, steps, order and the error bound of one allocation."""
        sizes, multiple = allocation.dimensions, allocation.rank_multiple
        step = width_step(sizes, multiple)
        for w, r, k in ((kept.keep, kept.value_rank, kept.mlp_width) for kept in allocation.layers):
            if w == 1:
                assert (r, k) == (sizes.head_dim, sizes.intermediate_size)
            else:
                assert r in range(multiple, sizes.head_dim + 1, multiple)
                assert k in range(step, sizes.intermediate_size + 1, step)
        for values in (ranks_of(allocation), widths_of(allocation)):
            ordered = [value for _, value in sorted(zip(scores, values, strict=True))]
            assert ordered == sorted(ordered)
        asked = (1 - allocation.keep_ratio) * allocation.parameters_before
        removed = allocation.parameters_before - counted_parameters(allocation)
        assert abs(removed - asked) <= allowed_error(sizes, asked, multiple) + 1e-6

    @pytest.mark.parametrize("dimensions", PUBLISHED)
    @pytest.mark.parametrize("prune_qk", [False, True])
    def test_published_models_meet_every_target_up_to_80(self, dimensions, prune_qk):
        for percent in range(1, 81):
            allocation = select(dimensions, percent, seed=percent, prune_qk=prune_qk)
            assert allocation.rank_multiple == 8
            self.check(allocation, scores_for(dimensions, percent))

    @pytest.mark.parametrize("dimensions", PUBLISHED)
    def test_published_models_are_within_a_thousandth_of_the_published_targets(self, dimensions):
        for percent in (10, 20, 30, 40, 50):
            assert select(dimensions, percent).achieved_sparsity_percent == pytest.approx(percent, rel=0.001)

    @pytest.mark.parametrize("dimensions", NARROW)
    def test_narrow_heads_with_q_and_k_pruned_meet_every_target_up_to_80(self, dimensions):
        """Where the factors of Q and K would be no smaller than these, they stay whole and the MLP makes up for it."""
        for percent in range(1, 81):
            allocation = select(dimensions, percent, seed=percent, prune_qk=True)
            assert allocation.rank_multiple == 1
            self.check(allocation, scores_for(dimensions, percent))

    @settings(max_examples=150, deadline=None)
    @given(model_dimensions(), st.integers(1, 95), st.sampled_from([1, 2, 8]))
    def test_the_error_bound_holds_with_q_and_k_pruned(self, dimensions, percent, multiple):
        try:
            allocation = select(dimensions, percent, rank_multiple=multiple, prune_qk=True)
        except InputError:
            assume(False)
        self.check(allocation, scores_for(dimensions, 0))

    @settings(max_examples=300, deadline=None)
    @given(
        st.one_of(model_dimensions(), st.sampled_from(PUBLISHED)),
        st.integers(1, 95),
        st.sampled_from([2, 3, 4, 8]),
        st.data(),
    )
    def test_the_error_bound_holds_wherever_any_steps_meet_it(self, dimensions, percent, multiple, data):
        """When the selector refuses, a search over all totals of rank and width steps finds none either."""
        # Thousandths: scores that differ by a rounding error may be allotted steps in either order.
        n = dimensions.num_layers
        thousandths = data.draw(st.lists(st.integers(10, 1000), min_size=n, max_size=n, unique=True))
        scores = [score / 1000 for score in thousandths]
        keep_ratio = 1 - percent / 100
        assume(keep_ratio * dimensions.layer_parameters > dimensions.qk_parameters)
        selector = ImportancePreservingRankSelector(dimensions, rank_multiple=multiple)
        try:
            allocation = selector.allocate(scores, 1 - percent / 100)
        except InputError:
            assert self.nearest_miss(dimensions, scores, percent, multiple) > 0
        else:
            self.check(allocation, scores)

    @staticmethod
    def nearest_miss(dimensions: ModelDimensions, scores: list[float], percent: int, multiple: int) -> float:
        """Return by how much the best totals overstep the allowed error, trying all of them."""
        keep = allocate_keep_ratios(
            scores, ImportancePreservingRankSelector(dimensions).prunable_keep_ratio(1 - percent / 100)
        )
        n = sum(w < 1 for w in keep)
        step = width_step(dimensions, multiple)
        asked = percent / 100 * dimensions.num_layers * dimensions.layer_parameters
        rank_cost = multiple * dimensions.rank_parameters
        width_cost = step * dimensions.width_parameters
        pruned = n * (dimensions.layer_parameters - dimensions.qk_parameters)
        best = math.inf
        for ranks in range(n, n * (dimensions.head_dim // multiple) + 1):
            widths = (pruned - asked - ranks * rank_cost) / width_cost
            for rounded in (math.floor(widths), math.ceil(widths)):
                clamped = min(max(rounded, n), n * (dimensions.intermediate_size // step))
                best = min(best, abs(pruned - asked - ranks * rank_cost - clamped * width_cost))
        return best - allowed_error(dimensions, asked, multiple)

    @settings(max_examples=100, deadline=None)
    @given(model_dimensions(), st.integers(1, 60), st.booleans(), st.sampled_from([1, 2, 8]))
    def test_parameters_after_equal_those_of_the_matrices(self, dimensions, percent, prune_qk, multiple):
        try:
            allocation = select(dimensions, percent, rank_multiple=multiple, prune_qk=prune_qk)
        except InputError:
            assume(False)
        assert allocation.parameters_after == counted_parameters(allocation)

    def test_an_unreachable_target_names_the_reachable_ones(self):
        with pytest.raises(InputError, match=r"steps of 8 .* cannot remove 71 % .* can remove .* to 69\.\d %"):
            select(TINY, 71, rank_multiple=8)
        assert select(TINY, 69, rank_multiple=8).achieved_sparsity_percent == pytest.approx(69, abs=0.2)

    def test_a_keep_ratio_of_one_leaves_every_layer_whole(self):
        allocation = select(TINY, 0, rank_multiple=8)
        assert allocation.parameters_after == allocation.parameters_before
        assert set(widths_of(allocation)) == {172}

    def test_widths_move_by_64_only_where_that_is_cheap(self):
        assert [width_step(dimensions, 8) for dimensions in PUBLISHED] == [64] * 5
        assert width_step(TINY, 8) == 8
        assert width_step(PUBLISHED[0], 24) == 24

    @given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 60), st.data())
    def test_largest_remainder_sums_to_its_total_within_bounds_and_keeps_order(self, hundredths, most, data):
        ideal = [n / 100 for n in hundredths]
        total = data.draw(st.integers(len(ideal), len(ideal) * most))
        steps = largest_remainder(ideal, total, most)
        assert sum(steps) == total
        assert all(1 <= n <= most for n in steps)
        assert [n for _, n in sorted(zip(ideal, steps, strict=True))] == sorted(steps)

    def test_the_largest_remainders_are_rounded_up(self):
        assert largest_remainder([2.5, 3.7, 4.2, 1.6], 12, 10) == [2, 4, 4, 2]


class TestSelector:
    def test_the_default_multiple_is_8_for_heads_64_wide_and_1_below(self):
        assert ImportancePreservingRankSelector(replace(TINY, head_dim=64)).rank_multiple == 8
        assert ImportancePreservingRankSelector(replace(TINY, head_dim=63)).rank_multiple == 1

    def test_scores_for_another_number_of_layers_are_refused(self):
        with pytest.raises(InputError, match="'scores' has 3 entries; the model has 5 layers"):
            ImportancePreservingRankSelector(TINY).allocate([0.1, 0.2, 0.3], 0.8)

    @pytest.mark.parametrize("multiple", [0, -8, 9])
    def test_a_multiple_that_does_not_fit_a_head_is_refused(self, multiple):
        with pytest.raises(InputError, match=f"rank multiple {multiple} .* 1 to 8"):
            ImportancePreservingRankSelector(TINY, rank_multiple=multiple)

    def test_factors_that_cost_more_than_q_and_k_leave_them_whole(self):
        """At rank 8 of 8 the factors of a (8, 64) head are 576 weights, the head itself 512."""
        whole = floors_of([1.0] * 5, prune_qk=True)
        assert whole.parameters_after == whole.parameters_before
        halved = floors_of([0.5] * 5, prune_qk=True)
        assert halved.parameters_after == 5 * (12 * 4 * (64 + 8) + 12 * 4 * 64 + 3 * 64 * 86)


class TestRanksFile:
    @pytest.fixture
    def allocation(self) -> RankAllocation:
        return replace(select(TINY, 20), importance_sha256="ab" * 32)

    def test_a_saved_allocation_comes_back_equal(self, allocation, tmp_path):
        save_ranks(allocation, tmp_path / "new" / "ranks_20.json")
        assert load_ranks(tmp_path / "new" / "ranks_20.json") == allocation

    def test_the_file_states_target_ranks_and_parameters(self, allocation, tmp_path):
        save_ranks(allocation, tmp_path / "ranks_20.json")
        content = json.loads((tmp_path / "ranks_20.json").read_text())
        assert content["sparsity_ratio"] == 20
        assert content["prune_qk"] is False
        assert len(content["keep"]) == len(content["value_rank"]) == len(content["mlp_width"]) == 5
        assert content["parameters_before"] == 5 * (4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 172)
        assert content["parameters_after"] == counted_parameters(allocation)
        assert content["importance_sha256"] == "ab" * 32

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"value_rank": [1, 2]}, r"'value_rank' has 2 entries; the model has 5 layers"),
            ({"value_rank": [8, 9, 8, 8, 8]}, r"'value_rank' of layer 1 is 9; accepted: 1 to 8"),
            ({"value_rank": [8, 8, 8, 8, 2.5]}, r"Expected `int`, got `float` - at `\$\.value_rank\[4\]`"),
            ({"mlp_width": [172, 172, 0, 172, 172]}, r"'mlp_width' of layer 2 is 0; accepted: 1 to 172"),
            ({"mlp_width": [173, 172, 1, 172, 172]}, r"'mlp_width' of layer 0 is 173; accepted: 1 to 172"),
            ({"keep": [1, 1, 1, 1, 1.5]}, r"'keep' of layer 4 is 1.5; accepted: more than 0, at most 1"),
            ({"keep": [1, 1, 1, 1, math.nan]}, "is not JSON"),
            ({"prune_qk": 1}, r"Expected `bool`, got `int` - at `\$\.prune_qk`"),
            ({"rank_multiple": True}, r"Expected `int`, got `bool` - at `\$\.rank_multiple`"),
            ({"sparsity_ratio": "20"}, r"Expected `float`, got `str` - at `\$\.sparsity_ratio`"),
            ({"parameters_after": 1}, r"'parameters_after' is 1, but the ranks and widths add up to \d+"),
            ({"dimensions": {"architecture": "llama"}}, r"missing required field `num_layers` - at `\$\.dimensions`"),
            ({"mlp_width": None}, r"Expected `array`, got `null` - at `\$\.mlp_width`"),
        ],
    )
    def test_a_damaged_field_is_refused_by_file_and_name(self, allocation, tmp_path, change, complaint):
        path = tmp_path / "ranks_20.json"
        save_ranks(allocation, path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=complaint) as caught:
            load_ranks(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["keep", "value_rank", "mlp_width", "dimensions", "prune_qk", "parameters_before"])
    def test_a_missing_field_is_named(self, allocation, tmp_path, name):
        save_ranks(allocation, tmp_path / "r.json")
        content = json.loads((tmp_path / "r.json").read_text())
        del content[name]
        (tmp_path / "r.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"r.json: Object missing required field `{name}`"):
            load_ranks(tmp_path / "r.json")

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[]", "Expected `object`, got `array`")],
    )
    def test_a_file_that_is_no_json_object_is_refused(self, tmp_path, content, complaint):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(InputError, match=complaint):
            load_ranks(tmp_path / "r.json")

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot read .*none\.json: No such file"):
            load_ranks(tmp_path / "none.json")
