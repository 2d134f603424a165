"""The losses of distillation: Hinton's soft targets, TinyBERT's four and MiniLM's value relations, pure functions of tensors.

Equation numbers are those of Jiao et al. 2020 (arXiv 1909.10351v5) unless another paper is named. Every loss is a mean over
real tokens (or pairs of real tokens) only, so padding changes nothing. Whatever the models computed in, losses are computed in
float32 or finer.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tinylib.errors import UserError

CLASSES = "give the student a logit for each of the teacher's, of the same texts"
HEADS = "give the student as many heads as the teacher, or compare groups of them (match_heads)"


def soft_target_loss(
    student_logits: Float[Tensor, "B K"], teacher_logits: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return T²·KL(p_teacher ‖ p_student) of the softened distributions, the mean over the batch (Hinton et al. 2015, section 2).

    The factor T² keeps the gradient, T·(p_s − p_t), of one size as T grows. The teacher's side gets no gradient. Over a single
    class (K = 1) both distributions are 1 and the loss is 0 whatever the logits: scores need ``prediction_loss``.
    Raises UserError unless ``temperature`` is above 0 and finite, and if the two shapes differ.
    """
    if not 0 < temperature < math.inf:  # NaN fails too
        raise UserError(f"temperature={temperature} must be greater than 0 and finite; 1 leaves the logits as they are")
    _same_shape("soft_target_loss", student_logits, teacher_logits, CLASSES)
    student = F.log_softmax(fine(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(fine(teacher_logits.detach()) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def prediction_loss(
    student_logits: Float[Tensor, "B K"], teacher_logits: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return what the prediction step minimises: ``soft_target_loss`` of classes, of scores (K = 1) the mean squared difference.

    KL over one class is 0 and teaches nothing. A score has no temperature either. Jiao et al. trained their regression task
    (STS-B) on the labels; here the student learns from the teacher's scores, as it does from the teacher's classes, so that
    augmented and unlabelled texts can serve too. Raises UserError if the two shapes differ, and for classes as
    ``soft_target_loss`` does.
    """
    _same_shape("prediction_loss", student_logits, teacher_logits, CLASSES)
    if student_logits.shape[-1] > 1:
        return soft_target_loss(student_logits, teacher_logits, temperature)
    return (fine(student_logits) - teacher_logits.detach()).square().mean()


def hidden_loss(
    student_hidden: Float[Tensor, "B T C"], teacher_hidden: Float[Tensor, "B T C"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference over real tokens and width (eq. 8, the student's side projected already).

    ``mask`` (B, T): True or 1 = real token; None: all are.
    Raises UserError if the two shapes differ or the mask's is not (B, T).
    """
    return _state_loss("hidden_loss", student_hidden, teacher_hidden, mask)


def embedding_loss(
    student_embedding: Float[Tensor, "B T C"], teacher_embedding: Float[Tensor, "B T C"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the embedding outputs over real tokens and width (eq. 9).

    Raises UserError if the two shapes differ or the mask's is not (B, T).
    """
    return _state_loss("embedding_loss", student_embedding, teacher_embedding, mask)


def attention_loss(
    student_scores: Float[Tensor, "B H T S"], teacher_scores: Float[Tensor, "B H T S"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the scores before softmax over heads and pairs of real tokens (eq. 7).

    ``mask`` (B, T): True or 1 = real token; None: all are.
    Raises UserError if the two shapes differ or the mask's is not (B, T).
    """
    _same_shape("attention_loss", student_scores, teacher_scores, HEADS)
    difference = fine(student_scores) - teacher_scores.detach()
    if mask is None:
        return difference.square().mean()
    _check_mask("attention_loss", mask, difference[:, 0])
    pairs = (mask.bool()[:, :, None] & mask.bool()[:, None, :])[:, None]
    # filled before squaring, as in _masked_mean_square; the same pairs count in every head
    kept = difference.masked_fill_(~pairs, 0.0)  # in place: nobody else reads the difference
    return kept.square().sum() / (pairs.sum().clamp(min=1) * difference.shape[1])


def attention_probability_loss(
    student_scores: Float[Tensor, "B H T S"], teacher_scores: Float[Tensor, "B H T S"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the same mean of the attention weights after softmax: the variant that the paper decides against (section 3.1).

    Weights lie in [0, 1] and most near 1/T, so this loss is small and its gradient all but inert. Raises UserError if the two
    shapes differ or the mask's is not (B, T).
    """
    _same_shape("attention_probability_loss", student_scores, teacher_scores, HEADS)
    _check_mask("attention_probability_loss", mask, student_scores[:, 0])
    student, teacher = (_over_real_pairs(scores, mask).softmax(-1) for scores in (student_scores, teacher_scores.detach()))
    return attention_loss(student, teacher, mask)


def value_relation_loss(
    student_relations: Float[Tensor, "B H T T"], teacher_relations: Float[Tensor, "B H T T"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return KL(teacher ‖ student) of the softmaxed value relations, the mean over heads and real queries.

    Wang et al. 2020 (MiniLM, arXiv 2002.10957), eqs. 6 to 8, there of the last layer alone. What is compared are v·vᵀ/√D of
    each head (``Bert.forward(keep_relations=…)``), of any head width D. ``mask`` (B, T): True or 1 = real token; None: all
    are. Raises UserError if the two shapes differ or the mask's is not (B, T).
    """
    return _divergence("value_relation_loss", student_relations, teacher_relations, mask)


def attention_divergence_loss(
    student_scores: Float[Tensor, "B H T T"], teacher_scores: Float[Tensor, "B H T T"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return KL(teacher ‖ student) of the attention weights after softmax, the mean over heads and real queries.

    Wang et al. 2020 (MiniLM), eq. 5, there of the last layer alone. It asks of a teacher nothing but its weights p, since log p
    stands for scores. Unlike ``attention_probability_loss`` its gradient, p_s − p_t, is not damped by p_s once more.
    Raises UserError if the two shapes differ or the mask's is not (B, T).
    """
    return _divergence("attention_divergence_loss", student_scores, teacher_scores, mask)


def _divergence(name: str, student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> Tensor:
    _same_shape(name, student_scores, teacher_scores, HEADS)
    _check_mask(name, mask, student_scores[:, 0])
    student, teacher = (_over_real_pairs(x, mask).log_softmax(-1) for x in (student_scores, teacher_scores.detach()))
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    B, H, T, _ = student_scores.shape
    queries = B * T if mask is None else mask.bool().sum().clamp(min=1)
    return divergence / (H * queries)


def match_heads(
    student: Float[Tensor, "B H1 T S"], teacher: Float[Tensor, "B H2 T S"]
) -> tuple[Float[Tensor, "B G T S"], Float[Tensor, "B G T S"]]:
    """Return both sides' scores (or value relations) with one number of heads, G = gcd(H1, H2), so that they can be compared.

    Where the counts agree, both come back as they are. Else each side is cut into G groups of consecutive heads, and the mean
    of each group is compared: with 12 heads in the teacher and 4 in the student, each student head learns from the mean of
    three. Why the mean of scores: Σ q_h·k_h over a group is one product of the group's queries and keys laid side by side, so
    the mean is again the score of a head (a wider one), which a student head can learn, at its rank; a mean of weights after
    softmax is none. Divided by the number of heads, it keeps their size.
    """
    groups = math.gcd(student.shape[1], teacher.shape[1])
    return group_heads(student, groups), group_heads(teacher, groups)


def group_heads(scores: Float[Tensor, "B H T S"], groups: int) -> Float[Tensor, "B G T S"]:
    """Return the mean over each of ``groups`` groups of consecutive heads; the scores themselves if there are as many heads.

    Raises UserError if ``groups`` does not divide the heads.
    """
    H = scores.shape[1]
    if groups == H:
        return scores
    if groups < 1 or H % groups:
        raise UserError(f"groups={groups} must divide the {H} heads; choose a divisor of {H}")
    return scores.unflatten(1, (groups, H // groups)).mean(2)


def _over_real_pairs(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return scores whose softmax sees real keys only; the row of a query that is padding comes out the same for all."""
    scores = fine(scores)
    if mask is None:
        return scores
    pairs = (mask.bool()[:, :, None] & mask.bool()[:, None, :])[:, None]
    # finite, since 0·(−inf) is NaN, and before the softmax, since the padding may hold NaN
    return scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)


def fine(x: Tensor) -> Tensor:
    """Return half precision widened to float32, and what is finer as it is."""
    # rounded to bfloat16, a log of −5 would be off by up to 0.016: as much as the divergence of two models that are alike
    return x.to(torch.promote_types(x.dtype, torch.float32))


ATTENTION = {
    "scores": attention_loss,
    "probabilities": attention_probability_loss,
    "divergence": attention_divergence_loss,
    "values": value_relation_loss,
}
MEANS_OVER_PAIRS = ("scores", "probabilities")  # of those in ATTENTION; the others are means over queries


def _state_loss(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    _same_shape(name, student, teacher, "project the student's states first (Projections)")
    difference = fine(student) - teacher.detach()
    _check_mask(name, mask, difference)
    return _masked_mean_square(difference, None if mask is None else mask.bool())


def _masked_mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    """Average the squares over the places that the mask keeps and over the last axis, which the mask does not have."""
    if mask is None:
        return difference.square().mean()
    # Filled before squaring, not multiplied after: the padding may hold NaN or inf, whose gradient would be NaN too.
    kept = difference.masked_fill_(~mask[..., None], 0.0)  # in place: nobody else reads the difference
    return kept.square().sum() / (mask.sum().clamp(min=1) * difference.shape[-1])


def _check_mask(name: str, mask: Tensor | None, difference: Tensor) -> None:
    B, T = difference.shape[:2]
    if mask is not None and mask.shape != (B, T):
        raise UserError(f"{name}: mask has shape {tuple(mask.shape)}, not (B, T) = {(B, T)}; pass one entry a token")


def _same_shape(name: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    if student.shape != teacher.shape:
        raise UserError(f"{name}: student has shape {tuple(student.shape)}, teacher {tuple(teacher.shape)}; {remedy}")
