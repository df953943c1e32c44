"""Moments, head-wise PCA, Nyström selection and blocked factors against closed forms and LAPACK."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import random
from flatllmcore.core import cholesky, moments
from flatllmcore.core.attention_pca import headwise_pca, project_heads, project_output, rank_for_mass
from flatllmcore.core.mlp_nystrom import few_tokens_jitter, reconstruct_down_projection, select_channels
from flatllmcore.core.moments import add_head_moments, add_moment, mirror_lower_triangle
from flatllmcore.utils.devices import float32_product


@given(width=st.integers(1, 40), block=st.integers(1, 17), chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_streamed_moments_equal_the_one_shot_product(width, block, chunks):
    rows = random(sum(chunks), width)
    total = torch.zeros(width, width, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "BLOCK", block)
        for chunk in rows.split(chunks):
            add_moment(total, chunk)
        mirror_lower_triangle(total)
    torch.testing.assert_close(total, rows.T @ rows)


MASSIVE = [1, 0.5, 0.3, 0.2, 0.1, 0.05]


@pytest.mark.parametrize("largest", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_massive_activations_give_what_sums_in_float64_give(dtype, largest, device):
    """Eight tokens have six channels that are nearly multiples of each other, and the other tokens tell them apart."""
    rows = 0.5 * random(1024, 128)
    rows[:8, :6] += largest * torch.tensor(MASSIVE) * (1 + 0.02 * random(8, 1, seed=1))
    rows, weight = rows.to(device, dtype), random(16, 128, seed=2).to(device)
    total = torch.zeros(128, 128, dtype=torch.float64, device=device)
    add_moment(total, rows)
    mirror_lower_triangle(total)
    exact = rows.double().T @ rows.double()
    ordinary = rows[8:].double().square().sum(0).max()
    assert ((total - exact).abs().max() / ordinary).item() < 1e-5
    kept = select_channels(total, 96)
    assert torch.equal(kept, select_channels(exact, 96))
    fitted, expected = (reconstruct_down_projection(weight, moment, kept) for moment in (total, exact))
    torch.testing.assert_close(fitted, expected, rtol=1e-4, atol=1e-5)
    heads = torch.zeros(4, 32, 32, dtype=torch.float64, device=device)
    add_head_moments(heads, rows)
    blocks = torch.stack([exact[i : i + 32, i : i + 32] for i in range(0, 128, 32)])
    assert ((heads - blocks).abs().max() / ordinary).item() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_massive_activations_a_batch_is_one_product_in_float32(dtype, device):
    """So that ordinary models stay what they were, to the bit; tokens of 15 times the usual length are ordinary."""
    rows = random(512, 96).to(device, dtype)
    rows[::50] *= 15
    total, heads = (torch.zeros(*size, dtype=torch.float64, device=device) for size in ((96, 96), (3, 32, 32)))
    add_moment(total, rows)
    add_head_moments(heads, rows)
    product = float32_product(rows.T, rows).double()
    assert torch.equal(total, product)
    per_head = rows.view(512, 3, 32).transpose(0, 1)
    assert torch.equal(heads, float32_product(per_head.mT, per_head).double())


def test_the_error_of_projected_values_is_the_sum_of_dropped_eigenvalues():
    values = random(200, 6) @ random(6, 6, seed=1)
    eigenvalues, directions = headwise_pca((values.T @ values)[None])
    for rank in range(1, 7):
        Q = directions[0, :, :rank]
        error = (values - values @ Q @ Q.T).square().sum().item()
        assert error == pytest.approx(eigenvalues[0, rank:].sum().item(), rel=1e-9, abs=1e-8)


def test_grouped_heads_are_full_heads_repeated():
    """Oracle: multi-head attention whose value weights and bases are the groups', repeated per query head."""
    G, n, d, r, D = 2, 3, 5, 2, 7
    bases = headwise_pca(random(G, d, d) @ random(G, d, d).mT)[1][..., :r]
    o_weight = random(D, G * n * d, seed=3)
    repeated = bases.repeat_interleave(n, dim=0)
    torch.testing.assert_close(project_output(o_weight, bases), project_output(o_weight, repeated))
    v_weight = random(G * d, D, seed=4)
    by_group = project_heads(v_weight, bases).view(G, r, D).repeat_interleave(n, dim=0)
    full = v_weight.view(G, d, D).repeat_interleave(n, dim=0).reshape(-1, D)
    torch.testing.assert_close(by_group.flatten(0, 1), project_heads(full, repeated))


def test_rank_for_mass_is_the_smallest_sufficient_rank():
    eigenvalues = torch.tensor([[8.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    assert rank_for_mass(eigenvalues, 0.8) == (1 + 3) / 2
    assert rank_for_mass(eigenvalues, 0.81) == (2 + 3) / 2
    assert rank_for_mass(eigenvalues, 1.0) == (3 + 4) / 2
    assert rank_for_mass(torch.zeros(1, 4, dtype=torch.float64), 0.96) == 0


def test_dead_channels_are_the_first_to_go_and_keep_their_weights_when_they_must_stay():
    z = random(100, 8)
    z[:, [1, 4]] = 0
    C, weight = z.T @ z, random(3, 8)
    assert select_channels(C, 6).tolist() == [0, 2, 3, 5, 6, 7]
    kept = select_channels(C, 7)
    assert kept.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(reconstruct_down_projection(weight, C, kept)[:, 1], weight[:, 1])


@pytest.mark.parametrize("tokens", [3, 6, 7, 9, 11, 200])
def test_the_reconstruction_is_the_least_squares_fit_of_the_dense_output(tokens):
    """Oracle: torch.linalg.lstsq on the activations themselves, also where they are fewer than channels."""
    z, weight = random(tokens, 12) @ random(12, 12, seed=5), random(4, 12, seed=6)
    kept = select_channels(z.T @ z, 7)
    fitted = reconstruct_down_projection(weight, z.T @ z, kept)
    best = torch.linalg.lstsq(z[:, kept], z @ weight.T, driver="gelsd").solution.T
    if tokens == 200:
        torch.testing.assert_close(fitted, best, rtol=1e-7, atol=1e-8)
    error, best_error = ((z[:, kept] @ solved.T - z @ weight.T).norm() for solved in (fitted, best))
    assert error <= best_error + 1e-3 * (z @ weight.T).norm()
    assert fitted.norm() < 100 * weight.norm()


@pytest.mark.parametrize("tokens", [8, 12, 20, 30])
def test_with_few_tokens_the_jitter_lowers_the_error_on_other_tokens(tokens):
    """Oracle: the error on held-out activations, over several draws, beside that of the exact solve."""
    errors = {0.0: 0.0, few_tokens_jitter(tokens, 12): 0.0}
    for seed in range(20):
        mixing, weight = random(12, 12, seed=seed), random(4, 12, seed=100 + seed)
        z, others = random(tokens, 12, seed=200 + seed) @ mixing, random(500, 12, seed=300 + seed) @ mixing
        kept = select_channels(z.T @ z, 8)
        for jitter in errors:
            fitted = reconstruct_down_projection(weight, z.T @ z, kept, jitter=jitter)
            errors[jitter] += (others[:, kept] @ fitted.T - others @ weight.T).square().mean().item()
    exact, jittered = errors.values()
    assert jittered < exact


def test_the_jitter_fades_out_up_to_four_tokens_per_channel():
    jitters = [few_tokens_jitter(tokens, 100) for tokens in range(1, 500)]
    assert 0.0999 > jitters[0] > 0.09
    assert jitters == sorted(jitters, reverse=True)
    assert [jitter > 0 for jitter in jitters] == [tokens < 400 for tokens in range(1, 500)]


def test_a_moment_beyond_float64_s_digits_still_ranks_its_channels():
    """A text of one token sums a matrix of rank 1; a ridge of 1 is lost beside entries of 1e18."""
    z = 1e9 * torch.arange(1.0, 7.0, dtype=torch.float64)[None]
    assert select_channels(z.T @ z, 2).tolist() == [4, 5]


def test_duplicated_channels_are_solved_with_jitter():
    z = random(100, 5)
    z = torch.cat([z, z[:, :2]], dim=1)
    weight = random(3, 7)
    kept = torch.arange(6)  # channels 0 and 5 are the same
    assert torch.linalg.matrix_rank(z[:, kept]) == 5  # without jitter there is no factor
    fitted = reconstruct_down_projection(weight, z.T @ z, kept)
    torch.testing.assert_close(z[:, kept] @ fitted.T, z @ weight.T, rtol=1e-5, atol=1e-5)


@given(size=st.integers(1, 50))
def test_factor_and_inverse_are_lapack_s(size):
    rows = random(2 * size, size, seed=size)
    matrix = rows.T @ rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cholesky, "BLOCK", 8)
        factor = cholesky.cholesky(matrix)
        torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix))
        torch.testing.assert_close(cholesky.inverse_column_energies(factor), torch.linalg.inv(matrix).diagonal())


@pytest.mark.parametrize("place", [0, 7, 8, 29])
def test_a_matrix_that_is_not_positive_definite_is_told(place, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 8)
    matrix = random(60, 30).T @ random(60, 30)
    matrix[place, place] = -1
    assert cholesky.cholesky(matrix) is None
    matrix[place, place] = -1e3
    with pytest.raises(ArithmeticError, match="not positive semidefinite"):
        select_channels(matrix, 10)


def test_rounding_of_float32_sums_ends_no_run():
    """Large activations of fewer tokens than channels: what their sums are rounded by is more than the ridge of 1."""
    rows = (1e4 * random(100, 300)).float()
    rows[:, 7] = 0
    total = torch.zeros(300, 300, dtype=torch.float64)
    add_moment(total, rows)
    mirror_lower_triangle(total)
    before = total.clone()
    assert torch.linalg.eigvalsh(total)[0] < -1
    kept = select_channels(total, 299)
    assert 7 not in kept
    assert torch.equal(total, before)
