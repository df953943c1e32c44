"""Shares, ranks and widths that IPRS allots, against plain arithmetic and a brute-force search."""

import math
import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from common import PUBLISHED as PUBLISHED_MODELS
from flatllmcore.core.curve_allocation import MLP, PAIRS, VALUES, ideal_without, outlines
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation, allocate_keep_ratios
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

QWEN3 = ModelDimensions("qwen3", 28, 2048, 16, 8, 128, 6144)
SMOLLM2 = ModelDimensions("llama", 30, 576, 9, 3, 64, 1536)
SIX_HEADS = ModelDimensions("llama", 8, 192, 6, 2, 32, 1792)

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


def select(dimensions: ModelDimensions, percent: float, seed: int = 0, **options) -> RankAllocation:
    selector = ImportancePreservingRankSelector(dimensions, **options)
    return selector.allocate(scores_for(dimensions, seed), 1 - percent / 100)


def counted_parameters(allocation: RankAllocation) -> int:
    """Count the weights from the shapes of the matrices themselves."""
    sizes, total = allocation.dimensions, 0
    for kept in allocation.layers:
        r, k = kept.value_rank, kept.mlp_width
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


def width_step(dimensions: ModelDimensions, multiple: int) -> int:
    """Return 64 where such a step is no multiple's fraction and costs less than half a percent of a layer."""
    is_cheap = 64 * 3 * dimensions.hidden_size < 0.005 * dimensions.layer_parameters
    return 64 if 64 % multiple == 0 and is_cheap else multiple


def allowed_error(dimensions: ModelDimensions, removed: float, multiple: int, step: int | None = None) -> float:
    """Return 0.1 % of what is to be removed, or one step of the smaller kind where that is more."""
    rank_step = multiple * (dimensions.num_heads + dimensions.num_kv_heads) * dimensions.hidden_size
    return max(0.001 * removed, min(rank_step, (step or width_step(dimensions, multiple)) * 3 * dimensions.hidden_size))


class TestKeepRatios:
    @given(score_lists, keep_ratios)
    @example([1.0, 1e-17], 0.5)  # a score that vanishes beside the other keeps a share above 0
    @example([0.1, 0.1, 0.1, 1e-300, 1e-300, 1e-300], 0.5)
    def test_shares_average_to_the_keep_ratio_within_bounds_and_in_the_order_of_scores(self, scores, keep_ratio):
        keep = allocate_keep_ratios(scores, keep_ratio)
        assert math.fsum(keep) == pytest.approx(len(scores) * keep_ratio, rel=1e-12)
        assert all(0 < w <= 1 for w in keep)
        assert all(w <= later for (_, w), (_, later) in pairwise(sorted(zip(scores, keep, strict=True))))

    @pytest.mark.parametrize("scale", [2.0**1020, 2.0**-1000])
    def test_shares_are_the_same_at_any_scale_of_the_scores(self, scale):
        """Three scores of 1e308 have no sum in float64."""
        scores = [7.0, 5.0, 3.3]
        assert allocate_keep_ratios([scale * s for s in scores], 0.6) == allocate_keep_ratios(scores, 0.6)

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


class TestBudget:
    @pytest.mark.parametrize(
        ("name", "percentages"),
        [
            ("llama-2-7b", [88, 76, 64, 52, 40]),
            ("llama-2-13b", [88, 76, 64, 52, 40]),
            ("llama-3-8b", [88, 77, 66, 55, 44]),
            ("mistral-7b", [88, 77, 66, 55, 44]),
        ],
    )
    def test_the_published_percentages_are_kept(self, name, percentages):
        whole, pruned = (
            ImportancePreservingRankSelector(PUBLISHED[NAMES.index(name)], prune_qk=prune_qk)
            for prune_qk in (False, True)
        )
        removed = (10, 20, 30, 40, 50)
        assert [int(100 * whole.prunable_keep_ratio(1 - percent / 100)) for percent in removed] == percentages
        assert pruned.prunable_keep_ratio(0.3) == pytest.approx(0.3)

    @pytest.mark.parametrize(
        ("dimensions", "narrowest", "by_curves"),
        list(zip(PUBLISHED, (82, 82, 90, 89, 89), (72, 72, 80, 79, 79), strict=True)),
    )
    def test_the_most_that_can_be_removed_from_published_models(self, dimensions, narrowest, by_curves):
        """With Q and K whole, in multiples of 8; with Q and K pruned 90 % is no limit to scores."""
        selector = ImportancePreservingRankSelector(dimensions)
        found = select(dimensions, narrowest).achieved_sparsity_percent
        assert found == pytest.approx(narrowest, abs=0.1)
        far = outlines(dimensions, [True] * dimensions.num_layers)
        for of_curves, largest in ((None, narrowest), (far, by_curves)):
            selector.check_target(1 - largest / 100, of_curves)
            with pytest.raises(InputError, match=f"largest possible target is {largest} %; more with Q and K pruned"):
                selector.check_target(1 - (largest + 1) / 100, of_curves)
        assert select(dimensions, 90, prune_qk=True).achieved_sparsity_percent == pytest.approx(90, abs=0.1)

    @given(model_dimensions(), st.sampled_from([1, 2, 8]), st.booleans(), st.integers(0, 99))
    @example(ModelDimensions("llama", 1, 8, 6, 6, 8, 16), 1, False, 0)  # one step too few, and 1 - 0.55 is rounded
    @example(TINY, 1, False, 0)
    @example(NARROW[0], 1, False, 0)
    def test_what_is_not_refused_before_scoring_is_met_by_any_scores(self, dimensions, multiple, prune_qk, seed):
        """The largest target that is named is removed, and floors that would remove less are not taken."""
        options = {"rank_multiple": min(multiple, dimensions.head_dim // 2), "prune_qk": prune_qk}
        with pytest.raises(InputError, match="impossible") as refused:
            select(dimensions, 100, seed, **options)
        largest = int(re.search(r"largest possible target is (\d+) %", str(refused.value))[1])
        allocation, refusal = None, ""
        try:
            allocation = select(dimensions, largest, seed, **options)
        except InputError as error:
            refusal = str(error)
        if allocation is None:
            assert "only roughly; give another target or smaller steps" in refusal
            # Not where each part can take up what a step of the other leaves, and factors of Q and K are much smaller.
            assert dimensions not in (TINY, NARROW[0])
            assert (
                dimensions.hidden_size < 4 * dimensions.head_dim
                or dimensions.width_parameters * dimensions.intermediate_size < dimensions.qk_parameters
                or dimensions.rank_parameters * dimensions.head_dim < 64 * dimensions.width_parameters
            )
            return
        removed = largest / 100 * allocation.parameters_before
        missing = removed - (allocation.parameters_before - counted_parameters(allocation))
        assert missing <= allowed_error(dimensions, removed, allocation.rank_multiple) + 1e-6

    @pytest.mark.parametrize(("share", "pairs"), [(0, None), (0.05, None), (0.2, 12), (0.9, 2)])
    def test_a_layer_that_keeps_all_of_its_rotary_pairs_has_lost_none(self, share, pairs):
        """Of 16 pairs, in steps of 2."""
        sizes = ModelDimensions("llama", 1, 64, 4, 2, 32, 96)
        ideal = ideal_without(sizes, {PAIRS: share * 32 * sizes.rank_parameters}, 4)
        assert ideal.kept_with(32, 96).query_key_pairs == pairs

    @pytest.mark.parametrize("prune_qk", [False, True])
    @pytest.mark.parametrize("with_pairs", [0, 0.75, 1])
    @pytest.mark.parametrize("dimensions", [*PUBLISHED, QWEN3, TINY, SMOLLM2])
    def test_the_most_that_curves_of_damage_remove_is_met_whatever_layers_have_pairs_to_lose(
        self, dimensions, with_pairs, prune_qk
    ):
        """Pairs are Q and K by halves; V and O go to a quarter and MLPs to a tenth."""
        selector = ImportancePreservingRankSelector(dimensions, prune_qk=prune_qk)
        ends = {VALUES: 0.75 * dimensions.head_dim * dimensions.rank_parameters, PAIRS: dimensions.qk_parameters / 2}
        ends[MLP] = round(0.9 * dimensions.intermediate_size) * dimensions.width_parameters
        layers = range(dimensions.num_layers)
        free = [i < with_pairs * dimensions.num_layers for i in layers]
        curves = [
            {
                kind: [(0, 0), (end / 2, 1 + i), (end, 9)] if kind != PAIRS or free[i] else [(0, 0)]
                for kind, end in ends.items()
            }
            for i in layers
        ]
        with pytest.raises(InputError, match="impossible") as before:
            selector.check_target(0, outlines(dimensions, free))
        with pytest.raises(InputError, match="impossible") as behind:
            selector.allocate(scores_for(dimensions, 0), 0, curves)
        assert str(before.value) == str(behind.value)
        assert ("--prune_qk" in str(before.value)) == (any(free) and not prune_qk)
        assert ("by the published method" in str(before.value)) != ("--prune_qk" in str(before.value))
        largest = int(re.search(r"largest possible target is (\d+) %", str(before.value))[1])
        allocation = selector.allocate(scores_for(dimensions, 0), 1 - largest / 100, curves)
        assert prune_qk or set(allocation.per_layer("query_key_pairs")) == {None}
        missing = largest / 100 * allocation.parameters_before - (
            allocation.parameters_before - allocation.parameters_after
        )
        assert abs(missing) <= max(0.001 * allocation.parameters_before, 64 * dimensions.width_parameters)
        whole = [end for kind, end in ends.items() if kind != PAIRS]
        most = dimensions.num_layers * sum(whole) + (sum(free) * ends[PAIRS] if prune_qk else 0)
        assert largest == pytest.approx(100 * most / allocation.parameters_before, abs=1.1)


class TestPublishedFloors:
    @given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), model_dimensions())
    def test_ranks_and_widths_are_exact_floors_and_at_least_one(self, thousandths, dimensions):
        assert math.floor(0.29 * 100) == 28  # why shares are taken exactly
        selector = ImportancePreservingRankSelector(replace(dimensions, num_layers=len(thousandths)))
        floors = selector.floored([n / 1000 for n in thousandths])
        assert floors.per_layer("value_rank") == [max(1, n * dimensions.head_dim // 1000) for n in thousandths]
        assert floors.per_layer("mlp_width") == [max(1, n * dimensions.intermediate_size // 1000) for n in thousandths]

    @pytest.mark.parametrize("dimensions", PUBLISHED)
    def test_at_a_multiple_of_1_ranks_are_the_floors_and_remove_at_least_the_target(self, dimensions):
        """Oracle: r = ⌊w·d⌋ and k = ⌊w·F⌋ as published, where Q and K stay whole."""
        for percent in range(1, 80):
            allocation = select(dimensions, percent, rank_multiple=1)
            assert allocation == select(dimensions, percent, rank_multiple=1, width_multiple=1)
            for kept in allocation.layers:
                floors = (kept.keep * dimensions.head_dim, kept.keep * dimensions.intermediate_size)
                assert (kept.value_rank, kept.mlp_width) == tuple(map(int, floors))
            assert percent - 1e-9 <= allocation.achieved_sparsity_percent < percent + 1

    @pytest.mark.parametrize("prune_qk", [False, True])
    def test_given_layers_state_what_they_remove(self, prune_qk):
        """At rank 8 of 8 the factors of a (8, 64) head are 576 weights, the head itself 512: these stay whole."""
        selector = ImportancePreservingRankSelector(TINY, prune_qk=prune_qk)
        allocation = selector.floored([0.9, 0.5, 1.0, 0.25, 0.8])
        assert allocation.per_layer("value_rank") == [7, 4, 8, 2, 6]
        assert allocation.per_layer("mlp_width") == [154, 86, 172, 43, 137]
        assert allocation.per_layer("query_key_rank") == ([7, 4, None, 2, 6] if prune_qk else [None] * 5)
        removed = 1 - counted_parameters(allocation) / allocation.parameters_before
        assert allocation.sparsity_ratio == pytest.approx(100 * removed)
        assert allocation.achieved_sparsity_percent == pytest.approx(100 * removed)


class TestRoundedRanks:
    def check(self, allocation: RankAllocation, scores: list[float], step: int | None = None) -> None:
        """Check bounds, steps, order and the error bound of one allocation."""
        sizes, multiple = allocation.dimensions, allocation.rank_multiple
        step = step or width_step(sizes, multiple)
        for kept in allocation.layers:
            if kept.keep == 1:
                assert (kept.value_rank, kept.mlp_width) == (sizes.head_dim, sizes.intermediate_size)
            else:
                assert kept.value_rank in range(multiple, sizes.head_dim + 1, multiple)
                assert kept.mlp_width in range(step, sizes.intermediate_size + 1, step)
        for values in map(allocation.per_layer, ("value_rank", "mlp_width")):
            ordered = [value for _, value in sorted(zip(scores, values, strict=True))]
            assert ordered == sorted(ordered)
        assert allocation.parameters_after == counted_parameters(allocation)
        asked = allocation.sparsity_ratio / 100 * allocation.parameters_before
        removed = allocation.parameters_before - allocation.parameters_after
        assert abs(removed - asked) <= allowed_error(sizes, asked, multiple, step) + 1e-6

    @pytest.mark.parametrize("width_multiple", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize(("sizes", "step"), [(PUBLISHED[0], 8), (PUBLISHED[3], 8), (SMOLLM2, 32), (SIX_HEADS, 16)])
    def test_widths_and_the_input_of_o_proj_are_multiples_that_integers_like(self, sizes, step, width_multiple):
        """Of 32 heads a rank of any multiple of 8 will do, of 9 it takes one of 32, and of 6 one of 16."""
        for percent in (10, 20, 35):
            allocation = select(sizes, percent, percent, width_multiple=width_multiple)
            assert allocation.rank_multiple == (step if width_multiple > 16 else max(8, step // 2))
            self.check(allocation, scores_for(sizes, percent), width_multiple)
            assert {
                sizes.num_heads * rank % min(width_multiple, 32) for rank in allocation.per_layer("value_rank")
            } == {0}

    @pytest.mark.parametrize(
        ("dimensions", "prune_qk", "multiple"),
        [*((d, qk, 8) for d in PUBLISHED for qk in (False, True)), *((d, True, 1) for d in NARROW)],
    )
    def test_every_target_up_to_80_is_met(self, dimensions, prune_qk, multiple):
        """Published models within a thousandth; narrow heads where factors of Q and K may be no smaller than these."""
        for percent in range(1, 81):
            allocation = select(dimensions, percent, seed=percent, prune_qk=prune_qk)
            assert allocation.rank_multiple == multiple
            self.check(allocation, scores_for(dimensions, percent))
            if dimensions in PUBLISHED and percent in (10, 20, 30, 40, 50):
                assert allocation.achieved_sparsity_percent == pytest.approx(percent, rel=0.001)

    @settings(max_examples=400)
    @given(
        st.one_of(model_dimensions(), st.sampled_from(PUBLISHED)),
        st.integers(1, 95),
        st.sampled_from([(2, False), (3, False), (4, False), (8, False), (1, True), (2, True), (8, True)]),
        st.data(),
    )
    def test_the_error_bound_holds_wherever_any_steps_meet_it(self, dimensions, percent, choice, data):
        """When the selector refuses, a search over all totals of rank and width steps finds none either."""
        multiple, prune_qk = choice
        # Thousandths: scores that differ by a rounding error may be allotted steps in either order.
        n = dimensions.num_layers
        thousandths = data.draw(st.lists(st.integers(10, 1000), min_size=n, max_size=n, unique=True))
        scores = [score / 1000 for score in thousandths]
        keep_ratio = 1 - percent / 100
        assume(prune_qk or keep_ratio * dimensions.layer_parameters > dimensions.qk_parameters)
        selector = ImportancePreservingRankSelector(dimensions, rank_multiple=multiple, prune_qk=prune_qk)
        try:
            allocation = selector.allocate(scores, keep_ratio)
        except InputError:
            assume(not prune_qk)
            keep = allocate_keep_ratios(scores, selector.prunable_keep_ratio(keep_ratio))
            assert self.nearest_miss(dimensions, keep, percent, multiple) > 0
        else:
            self.check(allocation, scores)

    @staticmethod
    def nearest_miss(dimensions: ModelDimensions, keep: list[float], percent: int, multiple: int) -> float:
        """Return by how much the best totals overstep the allowed error, trying all of them."""
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


@pytest.mark.parametrize("multiple", [0, -8, 9])
def test_multiples_and_scores_that_do_not_fit_the_model_are_refused(multiple):
    with pytest.raises(InputError, match=f"rank multiple {multiple} .* 1 to 8"):
        ImportancePreservingRankSelector(TINY, rank_multiple=multiple)
    with pytest.raises(InputError, match=r"width multiple 173 .* 1 to 172"):
        ImportancePreservingRankSelector(TINY, width_multiple=173)
    with pytest.raises(InputError, match="'scores' has 3 entries; the model has 5 layers"):
        ImportancePreservingRankSelector(TINY).allocate([0.1, 0.2, 0.3], 0.8)
    defaults = [ImportancePreservingRankSelector(replace(TINY, head_dim=width)).rank_multiple for width in (63, 64)]
    assert defaults == [1, 8]
