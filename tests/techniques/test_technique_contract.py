"""The contract of every technique on every ranker.

A further technique is a row of TECHNIQUES, a further ranker a row of SUBJECTS.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from freshrank.errors import ConfigError
from freshrank.techniques.activation_hook import ActivationHook
from freshrank.techniques.aldi import Student, ranking_alignment, rating_alignment, teacher_weight
from freshrank.techniques.feature_dropout import draw_rows
from freshrank.techniques.meta_embedding import IdGenerator, alignment
from freshrank.techniques.mixup import mixup
from freshrank.techniques.score_reg import score_reg
from freshrank.techniques.self_supervision import Contrastive, Vime, pretrain
from freshrank.training.objective import masked_bce
from tests.techniques.subjects import MASKING, SUBJECTS, Example, Subject

ROWS = 64


class Trial:
    """One ranker with one technique, as a training loop has them at hand."""

    def __init__(self, subject: str, technique: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.subject: Subject = SUBJECTS[subject](technique == "residual")
        example = self.subject.example(4)
        # Everything a technique brings along is built before the loop; `fork_rng` keeps the ranker's own draws.
        with torch.random.fork_rng(), torch.no_grad():
            x_nh = self.subject.run(example).x_nh
            self.student = Student(x_nh.shape[1], example.labels.shape[1], (8,))
            widths = [x.shape[1] for x in self.subject.embed(self.subject.fields(example))]
            self.id_generator = IdGenerator(sum(widths), len(self.subject.new_row()), 8)
            self.vime, self.contrastive = Vime(widths, 8, 0.3), Contrastive(widths, 8, 0.5, 0.1)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def modules(self) -> list[nn.Module]:
        pieces = [self.student, self.id_generator, self.vime, self.contrastive]
        return [self.subject.model, *pieces, *([self.subject.residual] if self.subject.residual else [])]

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter({p: None for module in self.modules() for p in module.parameters()})


Loss = Callable[[Trial, Example], Tensor]


def plain(trial: Trial, example: Example) -> Tensor:
    """What every technique is added to; the residual lives in the model."""
    return masked_bce(trial.subject.run(example).logits, example.labels)


def with_score_reg(trial: Trial, example: Example) -> Tensor:
    logits = trial.subject.run(example).logits
    return masked_bce(logits, example.labels) + 0.1 * score_reg(logits.sigmoid(), example.cold)


def with_mixup(trial: Trial, example: Example) -> Tensor:
    logits, z_bar, _ = trial.subject.run(example)
    z_mix, y_mix = mixup(z_bar, example.labels, 0.2, trial.generator)
    return masked_bce(logits, example.labels) + 0.2 * masked_bce(trial.subject.predict(example, z_mix), y_mix)


def with_feature_dropout(trial: Trial, example: Example) -> Tensor:
    return plain(trial, trial.subject.drop(example, draw_rows(len(example), 0.3, trial.generator)))


def with_history_masking(trial: Trial, example: Example) -> Tensor:
    return plain(trial, trial.subject.young(example, MASKING, trial.generator))


def with_aldi(trial: Trial, example: Example) -> Tensor:
    teacher, _, x_nh = trial.subject.run(example)
    student, weight = trial.student(x_nh), teacher_weight(example.impressions, example.cold, 10)
    aligned = rating_alignment(student, teacher, weight) + ranking_alignment(student, teacher, weight)
    return masked_bce(teacher, example.labels) + masked_bce(student, example.labels) + aligned


def with_meta_embedding(trial: Trial, example: Example) -> Tensor:
    subject, new = trial.subject, draw_rows(len(example), 0.3, trial.generator)
    content = torch.cat(subject.embed(subject.fields(example)), dim=1)
    seen: list[Tensor] = []

    def change(embedded: Tensor) -> Tensor:
        seen.append(embedded)
        return trial.id_generator(embedded, content, new)

    loss = masked_bce(subject.with_ids(subject.drop(example, new), change), example.labels)
    return loss + 0.1 * alignment(subject.new_row() + trial.id_generator.generate(content), seen[0], ~new)


def with_vime(trial: Trial, example: Example) -> Tensor:
    """The pretraining objectives beside the labels' loss here: what holds of the sum holds of either."""
    fields = trial.subject.fields(example)
    return plain(trial, example) + trial.vime(trial.subject.embed, fields, trial.generator)


def with_contrastive(trial: Trial, example: Example) -> Tensor:
    fields = trial.subject.fields(example)
    return plain(trial, example) + trial.contrastive(trial.subject.embed, fields, trial.generator)


TECHNIQUES: dict[str, Loss] = {
    "residual": plain,
    "score_reg": with_score_reg,
    "mixup": with_mixup,
    "feature_dropout": with_feature_dropout,
    "history_masking": with_history_masking,
    "aldi": with_aldi,
    "meta_embedding": with_meta_embedding,
    "pretraining (vime)": with_vime,
    "pretraining (contrastive)": with_contrastive,
}

every_ranker = pytest.mark.parametrize("subject", SUBJECTS)
every_technique = pytest.mark.parametrize("technique", TECHNIQUES)


def trained(trial: Trial, loss_of: Loss, steps: int, rate: float = 0.01) -> list[float]:
    """Losses of ``steps`` steps of Adam on one batch."""
    example = trial.subject.example(ROWS)
    optimizer = torch.optim.Adam(trial.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = loss_of(trial, example)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(trial: Trial) -> list[Tensor]:
    return [p.detach().clone() for module in trial.modules() for p in module.parameters()]


@every_ranker
@every_technique
def test_it_trains(subject: str, technique: str) -> None:
    """Every loss is finite, and the last ones are a tenth below the first at least."""
    losses = trained(Trial(subject, technique), TECHNIQUES[technique], 60)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every_ranker
def test_off_is_bit_identical_to_a_loop_that_has_never_heard_of_techniques(subject: str) -> None:
    """With all pieces at hand and none in use, the weights are those of the library's own model and loss."""
    torch.manual_seed(0)
    bare = SUBJECTS[subject](False)
    example, optimizer = bare.example(ROWS), torch.optim.Adam(bare.model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        masked_bce(bare.own(example), example.labels).backward()
        optimizer.step()
    off = Trial(subject, "mixup")
    trained(off, plain, 5)
    assert all(torch.equal(a, b) for a, b in zip(bare.model.parameters(), off.subject.model.parameters(), strict=True))


@every_ranker
@every_technique
def test_the_same_seed_trains_the_same_weights(subject: str, technique: str) -> None:
    """Bit for bit."""
    first, again = Trial(subject, technique), Trial(subject, technique)
    losses = [trained(trial, TECHNIQUES[technique], 3) for trial in (first, again)]
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))


@every_ranker
@every_technique
def test_its_draws_leave_the_global_random_state_alone(subject: str, technique: str) -> None:
    """So that switching it on moves nothing else that is random."""
    trial = Trial(subject, technique)
    example, before = trial.subject.example(ROWS), torch.random.get_rng_state()
    TECHNIQUES[technique](trial, example)
    assert torch.equal(torch.random.get_rng_state(), before)


@every_ranker
@every_technique
@pytest.mark.parametrize("temperature", ["cold", "warm"])
def test_a_batch_of_cold_or_of_warm_rows_only_has_finite_gradients(
    subject: str, technique: str, temperature: str
) -> None:
    """Fresh items are few: many batches have none."""
    trial = Trial(subject, technique)
    example = trial.subject.example(ROWS)
    _check_gradients(trial, technique, replace(example, cold=torch.full_like(example.cold, temperature == "cold")))


@every_ranker
@every_technique
def test_a_batch_of_one_row_has_finite_gradients(subject: str, technique: str) -> None:
    """The last batch of an epoch; in evaluation mode, since torch-rechub's batch norm cannot train on one row."""
    trial = Trial(subject, technique)
    _check_gradients(trial, technique, trial.subject.example(1), training=False)


@every_ranker
@every_technique
def test_labels_that_were_not_observed_have_finite_gradients(subject: str, technique: str) -> None:
    """Half of the labels of every action are NaN."""
    trial = Trial(subject, technique)
    example = trial.subject.example(ROWS)
    labels = example.labels.clone()
    labels[::2] = float("nan")
    _check_gradients(trial, technique, replace(example, labels=labels))


def _check_gradients(trial: Trial, technique: str, example: Example, training: bool = True) -> None:
    trial.subject.model.train(training)
    loss = TECHNIQUES[technique](trial, example)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [p.grad for p in trial.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_ranker
def test_the_residual_passes_gradient_to_its_own_layer_and_past_the_interaction(subject: str) -> None:
    """Eq. 3: what F takes is z followed by r(x_nh), and r learns."""
    trial = Trial(subject, "residual")
    example = trial.subject.example(ROWS)
    passed = trial.subject.run(example)
    assert torch.equal(passed.z_bar[:, -3:], trial.subject.residual.reduce(passed.x_nh))
    masked_bce(passed.logits, example.labels).backward()
    assert trial.subject.residual.reduce[0].weight.grad.abs().sum() > 0


@every_ranker
def test_predicting_from_the_same_z_bar_gives_the_same_logits(subject: str) -> None:
    """The hook is where it is said to be, so a mixed z_bar is all of what a mixed row differs in."""
    for technique in ("mixup", "residual"):
        trial = Trial(subject, technique)
        trial.subject.model.eval()
        example = trial.subject.example(ROWS)
        passed = trial.subject.run(example)
        assert torch.equal(trial.subject.predict(example, passed.z_bar), passed.logits)


@every_ranker
def test_mixed_rows_send_gradient_through_f_to_what_made_z(subject: str) -> None:
    """With the loss of the mixed rows alone."""
    trial = Trial(subject, "mixup")
    example = trial.subject.example(ROWS)
    z_bar = trial.subject.run(example).z_bar
    z_bar.retain_grad()
    z_mix, y_mix = mixup(z_bar, example.labels, 0.2, trial.generator)
    masked_bce(trial.subject.predict(example, z_mix), y_mix).backward()
    assert (z_bar.grad.abs().sum(1) > 0).float().mean() > 0.5


@every_ranker
def test_the_history_of_a_dropped_item_does_not_reach_the_prediction(subject: str) -> None:
    """Items of the same content are the same item without history, whatever it was; rows that are kept feel it."""
    trial = Trial(subject, "feature_dropout")
    trial.subject.model.eval()
    example = trial.subject.example(ROWS)
    dropped = torch.arange(ROWS) % 2 == 0
    histories = (example, trial.subject.other_history(example))
    first, second = (trial.subject.run(trial.subject.drop(e, dropped)).logits for e in histories)
    assert torch.allclose(first[dropped], second[dropped], atol=1e-6)
    assert not torch.allclose(first[~dropped], second[~dropped], atol=1e-6)


@every_ranker
def test_an_item_shown_as_just_born_predicts_the_same_whatever_its_history_was(subject: str) -> None:
    """With ``unseen`` 1, only its content and its drawn age reach the prediction; rows not masked feel theirs."""
    trial = Trial(subject, "history_masking")
    trial.subject.model.eval()
    example, masking = trial.subject.example(ROWS), MASKING.model_copy(update={"unseen": 1.0})
    warm = replace(example, cold=torch.zeros(ROWS, dtype=torch.bool))
    young = [
        trial.subject.young(e, masking, torch.Generator().manual_seed(1))
        for e in (warm, trial.subject.other_history(warm))
    ]
    masked = young[0].cold
    first, second = (trial.subject.run(e).logits for e in young)
    assert 0 < masked.sum() < ROWS
    assert torch.allclose(first[masked], second[masked], atol=1e-6)
    assert not torch.allclose(first[~masked], second[~masked], atol=1e-6)


@every_ranker
def test_downsampled_counters_reach_the_prediction(subject: str) -> None:
    """The same rows masked, with and without what is left of their counters: a young item is not an unseen one."""
    trial = Trial(subject, "history_masking")
    trial.subject.model.eval()
    young = [
        trial.subject.young(trial.subject.example(ROWS), masking, torch.Generator().manual_seed(1))
        for masking in (MASKING.model_copy(update={"share": 1.0, "unseen": unseen}) for unseen in (0.0, 1.0))
    ]
    few, none = (trial.subject.run(e).logits for e in young)
    assert not torch.allclose(few, none, atol=1e-6)


@every_ranker
def test_aldi_teaches_the_student_and_leaves_the_teacher_to_its_labels(subject: str) -> None:
    """The ranker's gradient with a student is bit for bit the one without."""
    gradients = []
    for loss_of in (plain, with_aldi):
        trial = Trial(subject, "aldi")
        loss_of(trial, trial.subject.example(ROWS)).backward()
        gradients.append([p.grad for p in trial.subject.model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(p.grad.abs().sum() > 0 for p in trial.student.parameters())


@every_ranker
def test_a_generated_id_reaches_the_predictions_of_new_items_and_of_no_others(subject: str) -> None:
    """An untrained generator changes nothing; with weights, it changes the rows without an id alone."""
    trial = Trial(subject, "meta_embedding")
    trial.subject.model.eval()
    new = torch.arange(ROWS) % 2 == 0
    example = trial.subject.drop(trial.subject.example(ROWS), new)
    content = torch.cat(trial.subject.embed(trial.subject.fields(example)), dim=1)
    own = trial.subject.own(example)
    assert torch.equal(trial.subject.with_ids(example, lambda e: trial.id_generator(e, content, new)), own)
    nn.init.normal_(trial.id_generator.layers[-1].weight)
    generated = trial.subject.with_ids(example, lambda e: trial.id_generator(e, content, new))
    assert torch.allclose(generated[~new], own[~new], atol=1e-6)
    assert ((generated[new] - own[new]).abs() > 1e-4).any(1).float().mean() > 0.5


@every_ranker
@pytest.mark.parametrize("objective", ["vime", "contrastive"])
def test_pretraining_moves_the_content_embeddings_and_nothing_else_of_the_ranker(subject: str, objective: str) -> None:
    """The loss falls; ids, interaction and prediction are where they were."""
    trial = Trial(subject, "pretraining")
    fields, piece = trial.subject.fields(trial.subject.example(ROWS)), getattr(trial, objective)
    before = {name: p.detach().clone() for name, p in trial.subject.model.named_parameters()}
    embeddings = list(trial.subject.embeddings())
    losses = pretrain(piece, trial.subject.embed, fields, embeddings, 60, 32, 0.01, trial.generator)
    meant = {id(p) for p in embeddings}
    for name, parameter in trial.subject.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in meant), name
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@every_ranker
def test_score_reg_alone_brings_warm_and_cold_means_together(subject: str) -> None:
    """Descending the penalty on one batch."""
    trial = Trial(subject, "score_reg")

    def gap(trial: Trial, example: Example) -> Tensor:
        return score_reg(trial.subject.run(example).logits.sigmoid(), example.cold)

    trained(trial, plain, 5)
    losses = trained(trial, gap, 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_pieces_keep_the_dtype_they_are_given(dtype: torch.dtype) -> None:
    """Nothing is silently computed, or returned, in another precision."""
    z, logits, cold = torch.randn(4, 3).to(dtype), torch.randn(4, 2).to(dtype), torch.tensor([True, False] * 2)
    weight = teacher_weight(torch.arange(4).to(dtype), cold, 10)
    fields, objectives = [z, z.flip(0)], (Vime([3, 3], 4, 0.5), Contrastive([3, 3], 4, 0.5, 0.1))
    results = [
        *mixup(z, logits, 0.2),
        score_reg(logits.sigmoid(), cold),
        Student(3, 2, (4,)).to(dtype)(z),
        weight,
        rating_alignment(logits, logits + 1, weight),
        ranking_alignment(logits, logits.flip(0), weight),
        IdGenerator(3, 2, 4).to(dtype)(logits, z, cold),
        alignment(logits, logits + 1, cold),
        *(objective.to(dtype)(list, fields) for objective in objectives),
    ]
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("calls", [0, 2])
def test_a_seam_must_be_passed_exactly_once(calls: int) -> None:
    """A module that runs twice (or never) in a pass is not where I ends; afterwards everything passes unchanged."""
    module, x = nn.Linear(2, 1), torch.ones(1, 2)
    hook = ActivationHook(module)
    with pytest.raises(ConfigError, match=f"Linear ran {calls} times, expected once"), hook.through(torch.zeros_like):
        for _ in range(calls):
            module(x)
    module(x)
    assert torch.equal(hook.z, x)
