"""Every technique as pieces of their own, by hand-computable numbers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from freshrank.techniques.aldi import Student, answer, ranking_alignment, rating_alignment, teacher_weight
from freshrank.techniques.feature_dropout import draw_rows, drop_rows
from freshrank.techniques.meta_embedding import IdGenerator, alignment
from freshrank.techniques.mixup import mixup
from freshrank.techniques.residual import Residual
from freshrank.techniques.score_reg import score_reg
from freshrank.techniques.self_supervision import (
    Contrastive,
    Vime,
    corrupt,
    info_nce,
    masked_fields,
    mutual_information,
    pretrain,
    reconstruction,
)


def test_residual_appends_the_reduced_non_historical_features_to_z() -> None:
    """Eq. 3: z_bar = [z; r(x_nh)]; z itself passes unchanged."""
    residual = Residual(x_nh_dim=3, dim=2)
    z, x_nh = torch.randn(4, 5), torch.randn(4, 3)
    z_bar = residual(z, x_nh)
    assert z_bar.shape == (4, 7)
    assert torch.equal(z_bar[:, :5], z)
    assert torch.equal(z_bar[:, 5:], residual.reduce(x_nh))


def test_score_reg_is_the_squared_difference_of_the_group_means_summed_over_actions() -> None:
    """Eq. 6: warm means (0.6, 0.2), cold means (0.2, 0.1): 0.16 + 0.01."""
    y_hat = torch.tensor([[0.5, 0.1], [0.7, 0.3], [0.2, 0.1]])
    cold = torch.tensor([False, False, True])
    assert score_reg(y_hat, cold).item() == pytest.approx(0.17)


@pytest.mark.parametrize("cold", [[False, False, False], [True, True, True]])
def test_score_reg_of_a_batch_with_one_group_only_is_zero_with_a_zero_gradient(cold: list[bool]) -> None:
    """A batch without cold (or warm) rows neither moves the loss nor poisons the gradient."""
    y_hat = torch.tensor([[0.5], [0.7], [0.2]], requires_grad=True)
    penalty = score_reg(y_hat, torch.tensor(cold))
    penalty.backward()
    assert penalty.item() == 0
    assert torch.equal(y_hat.grad, torch.zeros(3, 1))


def test_score_reg_pushes_warm_scores_down_and_cold_scores_up_when_warm_are_higher() -> None:
    """Descending the penalty closes the gap from both sides."""
    y_hat = torch.tensor([[0.8], [0.2]], requires_grad=True)
    score_reg(y_hat, torch.tensor([False, True])).backward()
    assert y_hat.grad[0].item() > 0 > y_hat.grad[1].item()


@given(st.integers(2, 40), st.floats(0.05, 4), st.integers(0, 10_000))
def test_mixup_mixes_every_row_with_another_one_and_labels_with_the_same_weight(
    size: int, alpha: float, seed: int
) -> None:
    """Eq. 7 with i != j: rows that are their own index reveal partner and weight."""
    z = torch.eye(size, dtype=torch.float64)
    z_mix, y_mix = mixup(z, z.clone(), alpha, torch.Generator().manual_seed(seed))
    assert torch.equal(z_mix, y_mix)
    assert torch.allclose(z_mix.sum(1), torch.ones(size, dtype=torch.float64))
    lam = z_mix.diagonal()
    partner_weight = (z_mix - torch.diag(lam)).max(1).values
    assert torch.allclose(partner_weight, 1 - lam)


def test_mixup_keeps_an_unobserved_label_unobserved() -> None:
    """NaN in either row of a pair stays NaN, so the masked loss ignores it."""
    y = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]])
    _, y_mix = mixup(torch.randn(2, 3), y, 0.2, torch.Generator().manual_seed(0))
    assert torch.isnan(y_mix[:, 0]).all()
    assert torch.equal(y_mix[:, 1], torch.ones(2))


def test_mixup_of_a_single_row_returns_that_row() -> None:
    """The last batch of an epoch may hold one row."""
    z, y = torch.randn(1, 3), torch.ones(1, 2)
    z_mix, y_mix = mixup(z, y, 0.2)
    assert torch.allclose(z_mix, z)
    assert torch.allclose(y_mix, y)


def test_mixup_weights_follow_a_beta_distribution() -> None:
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    z = torch.eye(4000, dtype=torch.float64)
    z_mix, _ = mixup(z, torch.zeros(4000, 1), 0.2, torch.Generator().manual_seed(1))
    lam = z_mix.diagonal()
    assert lam.mean().item() == pytest.approx(0.5, abs=0.03)
    assert lam.var().item() == pytest.approx(1 / (4 * 1.4), abs=0.02)


def test_mixup_with_its_own_generator_leaves_the_global_random_state_alone() -> None:
    """Switching mixup on must not change any other draw of the training run."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    mixup(torch.randn(4, 2, generator=torch.Generator()), torch.zeros(4, 1), 0.2, torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropped_rows_take_the_missing_values_and_the_others_keep_theirs() -> None:
    """Row 1 of two: two historical columns become 0 and NaN, the content column between them stays."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    dropped = drop_rows(x, torch.tensor([False, True]), torch.tensor([0.0, float("nan")]), columns=[0, 2])
    assert torch.equal(dropped.nan_to_num(-1), torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, -1.0]]))
    assert x[1, 0] == 4


def test_dropped_ids_become_one_id_and_keep_their_type() -> None:
    """Ids and padded sequences are dropped whole."""
    dropped = torch.tensor([True, False])
    assert drop_rows(torch.tensor([7, 8]), dropped, 1).tolist() == [1, 8]
    assert drop_rows(torch.tensor([[7, 8], [9, 10]]), dropped, 0).tolist() == [[0, 0], [9, 10]]


def test_the_share_of_dropped_rows_is_the_probability_and_the_generator_its_own() -> None:
    """10,000 draws at 0.3; the global random state does not move."""
    before = torch.random.get_rng_state()
    assert draw_rows(10_000, 0.3, torch.Generator().manual_seed(0)).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_student_passes_no_gradient_to_what_made_its_inputs() -> None:
    """The teacher's embeddings learn from the teacher alone."""
    x_nh = torch.randn(4, 3, requires_grad=True)
    student = Student(3, 2, (5,))
    student(x_nh).sum().backward()
    assert x_nh.grad is None
    assert all(p.grad is not None for p in student.parameters())


def test_the_student_answers_for_cold_rows_only() -> None:
    """Row 1 is cold."""
    served = answer(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([False, True]))
    assert served.tolist() == [[0], [1]]


def test_the_teacher_is_believed_by_half_after_half_impressions_and_never_about_cold_items() -> None:
    """n / (n + 10) for n = 0, 10, 30; the last item is cold."""
    weight = teacher_weight(torch.tensor([0.0, 10, 30, 30]), torch.tensor([False, False, False, True]), half=10)
    assert weight.tolist() == [0, 0.5, 0.75, 0]


def test_rating_alignment_is_the_divergence_from_the_teachers_probabilities() -> None:
    """Teacher 1/2, student 1/4: KL = 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = 1/2 log 4/3; row 1 has no weight."""
    student = torch.tensor([[-float(torch.log(torch.tensor(3.0)))], [5.0]])
    loss = rating_alignment(student, torch.zeros(2, 1), torch.tensor([0.7, 0.0]))
    assert loss.item() == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item(), abs=1e-6)


def test_ranking_alignment_cares_about_differences_only() -> None:
    """A student that is 3 too high everywhere orders as the teacher does; one that orders backwards does not."""
    teacher, weight = torch.randn(6, 2), torch.ones(6)
    assert ranking_alignment(teacher + 3, teacher, weight).item() == pytest.approx(0, abs=1e-6)
    assert ranking_alignment(-teacher, teacher, weight).item() > 0.01


def test_ranking_alignment_compares_neighbours_of_one_list_only() -> None:
    """Two lists of two: a student that lifts the second list as a whole loses nothing."""
    teacher, lists = torch.randn(4, 1), torch.tensor([0, 0, 1, 1])
    student = teacher + lists.unsqueeze(1) * 5
    assert ranking_alignment(student, teacher, torch.ones(4), lists).item() == pytest.approx(0, abs=1e-6)
    assert ranking_alignment(student, teacher, torch.ones(4)).item() > 0.01


@pytest.mark.parametrize("alignment", [rating_alignment, ranking_alignment])
def test_alignment_of_a_batch_without_warm_rows_is_zero_with_a_zero_gradient(alignment: Callable[..., Tensor]) -> None:
    """Nobody to learn from: neither the loss nor the gradient moves; nor does the teacher's, ever."""
    student, teacher = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    loss = alignment(student, teacher, torch.zeros(3))
    (10 * loss).backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(3, 2))
    assert teacher.grad is None


def _generator_of_ones() -> IdGenerator:
    """g(content) = (1, 1) whatever the content."""
    generator = IdGenerator(content_dim=3, id_dim=2, hidden=4)
    torch.nn.init.ones_(generator.layers[-1].bias)
    return generator


def test_an_id_is_generated_for_new_items_alone() -> None:
    """The new row (5, 6) becomes (6, 7); the known item keeps (1, 2)."""
    embedded = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    generated = _generator_of_ones()(embedded, torch.randn(2, 3), torch.tensor([False, True]))
    assert generated.tolist() == [[1, 2], [6, 7]]


def test_an_untrained_generator_leaves_new_items_with_the_row_they_share() -> None:
    """Its last layer starts at zero."""
    embedded = torch.randn(4, 2)
    assert torch.equal(IdGenerator(3, 2, 8)(embedded, torch.randn(4, 3), torch.tensor([True] * 4)), embedded)


def test_the_generator_learns_from_new_items_and_passes_no_gradient_to_their_content() -> None:
    """d sum / d bias = number of new rows; the content stays what the ranker makes of it."""
    generator, content = _generator_of_ones(), torch.randn(3, 3, requires_grad=True)
    generator(torch.zeros(3, 2), content, torch.tensor([True, False, True])).sum().backward()
    assert generator.layers[-1].bias.grad.tolist() == [2, 2]
    assert content.grad is None


def test_alignment_is_the_mean_squared_distance_over_known_items() -> None:
    """Distances 1 + 4 and 0; the unknown row of 100 does not count: 5 / 2."""
    generated, trained = (
        torch.tensor([[1.0, 2.0], [3.0, 3.0], [10.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]),
    )
    assert alignment(generated, trained, torch.tensor([True, True, False])).item() == pytest.approx(2.5)


@pytest.mark.parametrize(("gap", "known"), [(0.0, [True, True]), (1.0, [False, False])])
def test_alignment_is_zero_with_a_zero_gradient_where_both_agree_or_nothing_is_known(
    gap: float, known: list[bool]
) -> None:
    """And no gradient ever reaches the trained embedding."""
    trained = torch.ones(2, 3, requires_grad=True)
    generated = (torch.ones(2, 3) + gap).requires_grad_()
    loss = alignment(generated, trained, torch.tensor(known))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(generated.grad, torch.zeros(2, 3))
    assert trained.grad is None


@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 10_000))
def test_corruption_swaps_some_fields_for_other_items_and_keeps_the_rest(size: int, share: float, seed: int) -> None:
    """Changed is where the value differs; every value put in is one the field has, a vector as a whole."""
    codes, vectors = torch.arange(size), torch.arange(2.0 * size).reshape(size, 2)
    vectors[0] = float("nan")
    corrupted, changed = corrupt([codes, vectors], share, torch.Generator().manual_seed(seed))
    assert torch.equal(changed[:, 0], corrupted[0] != codes)
    rows = [vector.tolist() for vector in vectors.nan_to_num(-1)]
    donors = [rows.index(vector.tolist()) for vector in corrupted[1].nan_to_num(-1)]
    assert torch.equal(changed[:, 1], torch.tensor(donors) != codes)


def test_the_share_of_corrupted_fields_is_the_one_asked_for() -> None:
    """0.3 of 20,000 distinct values; 0 of two equal ones, whatever is drawn."""
    _, changed = corrupt([torch.arange(20_000)], 0.3, torch.Generator().manual_seed(0))
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not corrupt([torch.ones(2)], 1.0)[1].any()


def test_a_category_is_reconstructed_by_choosing_among_the_values_of_the_batch() -> None:
    """7 and 9 embedded as (1, 0) and (0, 1): a guess of 0 is log 2, a sure and right one 0, a wrong one 50."""
    field, vector = torch.tensor([7, 9, 7]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert reconstruction(torch.zeros(3, 2), field, vector).item() == pytest.approx(0.6931, abs=1e-4)
    assert reconstruction(50 * vector, field, vector).item() == pytest.approx(0)
    assert reconstruction(50 * vector.flip(1), field, vector).item() == pytest.approx(50)


def test_a_number_is_reconstructed_by_its_vector() -> None:
    """Mean of 1, 0, 0, 4; the vector is a constant."""
    vector = torch.zeros(2, 2, requires_grad=True)
    loss = reconstruction(torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True), torch.ones(2), vector)
    loss.backward()
    assert loss.item() == pytest.approx(1.25)
    assert vector.grad is None


def test_info_nce_of_matched_and_of_swapped_pairs() -> None:
    """Orthogonal pairs at temperature 1: log(1 + 1/e) matched, log(1 + e) swapped; lengths do not count."""
    first = torch.eye(2)
    assert info_nce(first, 3 * first, 1.0).item() == pytest.approx(0.3133, abs=1e-4)
    assert info_nce(first, first.flip(0), 1.0).item() == pytest.approx(1.3133, abs=1e-4)
    assert info_nce(first, first, 0.01).item() == pytest.approx(0)


@given(st.integers(2, 12), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_each_view_lacks_what_the_other_has_and_neither_is_empty(count: int, share: float, seed: int) -> None:
    """The nearest whole number of fields, at least one and not all."""
    masked = masked_fields(count, share, torch.Generator().manual_seed(seed))
    assert masked.sum().item() == min(max(1, round(share * count)), count - 1)


def test_fields_that_tell_of_each_other_are_masked_together() -> None:
    """0 goes with 1, 2 with 3: only these two pairs are ever drawn."""
    information = torch.eye(4) + torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    drawn = {tuple(masked_fields(4, 0.5, torch.Generator().manual_seed(s), information).tolist()) for s in range(20)}
    assert drawn == {(True, True, False, False), (False, False, True, True)}


def test_mutual_information_of_copies_and_of_independent_fields() -> None:
    """Four equal values: log 4 with a copy under other names, nothing with a field that is independent of them."""
    a, independent = torch.arange(4).repeat(4), torch.arange(4).repeat_interleave(4)
    information = mutual_information([a, 10 - a, independent[:, None]])
    assert information[0, 1].item() == pytest.approx(1.3863, abs=1e-4)
    assert information[0, 2].item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(information, information.T)


def test_mutual_information_bins_numbers_and_counts_a_missing_one_as_a_value() -> None:
    """Missing exactly where the category is 1: one bit, log 2, of it is known."""
    number = torch.where(torch.arange(200) % 2 == 1, torch.nan, torch.arange(200.0))
    information = mutual_information([torch.arange(200) % 2, number], bins=4)
    assert information[0, 1].item() == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("objective", ["vime", "contrastive"])
def test_pretraining_draws_from_its_generator_alone_and_repeats_under_it(objective: str) -> None:
    """Same seed, same embeddings; the global state is where it was."""
    results, state = [], torch.random.get_rng_state()
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tables = torch.nn.ModuleList([torch.nn.Embedding(10, 4), torch.nn.Embedding(5, 4)])
            piece = Vime([4, 4], 8, 0.3) if objective == "vime" else Contrastive([4, 4], 8, 0.5, 0.1)
        fields = [torch.arange(10), torch.arange(10) % 5]
        generator = torch.Generator().manual_seed(1)
        pretrain(
            piece,
            lambda f, t=tables: [a(b) for a, b in zip(t, f, strict=True)],
            fields,
            tables.parameters(),
            8,
            4,
            0.01,
            generator,
        )
        results.append(tables[0].weight.detach())
    assert torch.equal(*results)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pretraining_sees_every_item_before_any_comes_again() -> None:
    """Ten items in batches of five: every two steps are a round."""
    seen: list[int] = []

    def look(embed: object, fields: list[Tensor], generator: object) -> Tensor:
        seen.extend(fields[0].tolist())
        return table.weight.sum()

    table = torch.nn.Embedding(1, 1)
    look.parameters = list  # no modules of its own
    pretrain(look, list, [torch.arange(10)], table.parameters(), steps=4, batch_size=5, learning_rate=0.01)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
