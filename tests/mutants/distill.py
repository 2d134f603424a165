"""Lesson 04, the distillation loss."""

import torch
import torch.nn.functional as F
from torch import nn


def log_soft(z, T=1.0):
    return F.log_softmax(z / T, dim=-1)


def soft(z, T=1.0):
    return F.softmax(z / T, dim=-1)


# -- softened_probabilities ---------------------------------------------------------------------------------


def in_place(z, T):
    return z.div_(T).softmax(-1)


def sigmoid_of_the_difference(z, T):
    p = torch.sigmoid((z[:, 1] - z[:, 0]) / T)
    return torch.stack([1 - p, p], dim=1)


def naive_exponentials(z, T):
    e = (z / T).exp()
    return e / e.sum(-1, keepdim=True)


def stable_by_hand(z, T):
    e = ((z - z.amax(-1, keepdim=True)) / T).exp()
    return e / e.sum(-1, keepdim=True)


def powers(z, T):
    return F.normalize(z.softmax(-1).double() ** (1 / T), p=1, dim=-1).to(z.dtype)


# -- kd_gradient -------------------------------------------------------------------------------------------


def by_autograd(s, t, T):
    s = s.detach().clone().requires_grad_()
    loss = T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean")
    return torch.autograd.grad(loss, s)[0]


def softened_in_place(s, t, T):
    return T * (s.div_(T).softmax(-1) - t.div_(T).softmax(-1)) / len(s)


def by_backward(s, t, T):
    s.requires_grad_()
    (T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean")).backward()
    return s.grad


# -- soft_target_loss --------------------------------------------------------------------------------------


def kd(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t.detach(), T), reduction="batchmean")


def reversed_kl(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(t, T), soft(s, T), reduction="batchmean")


def mean_of_everything(s, t, T=1.0):
    # what reduction="mean" gives; a later torch is to make that batchmean
    return T**2 * nn.KLDivLoss(reduction="none")(log_soft(s, T), soft(t, T)).mean()


def sum_of_everything(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="sum")


def no_square(s, t, T=1.0):
    return F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean")


def factor_t(s, t, T=1.0):
    return T * F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean")


def inverted_square(s, t, T=1.0):
    return F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean") / T**2


def probabilities_first(s, t, T=1.0):
    return T**2 * F.kl_div(soft(s, T), soft(t, T), reduction="batchmean")


def double_softmax(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(soft(s, T)), soft(t, T), reduction="batchmean")


def double_softmax_teacher(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(soft(t, T)), reduction="batchmean")


def two_log_softmaxes_with_t(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(log_soft(s, T), T), soft(t, T), reduction="batchmean")


def log_target_forgotten(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), log_soft(t, T), reduction="batchmean")


def teacher_unsoftened(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t), reduction="batchmean")


def student_unsoftened(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s), soft(t, T), reduction="batchmean")


def temperature_ignored(s, t, T=1.0):
    return F.kl_div(log_soft(s), soft(t), reduction="batchmean")


def times_temperature(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s * T), soft(t * T), reduction="batchmean")


def soft_cross_entropy(s, t, T=1.0):
    return T**2 * F.cross_entropy(s / T, soft(t, T))


def over_the_batch(s, t, T=1.0):
    return T**2 * F.kl_div(F.log_softmax(s / T, dim=0), F.softmax(t / T, dim=0), reduction="batchmean")


def reversed_without_square(s, t, T=1.0):
    return F.kl_div(log_soft(t, T), soft(s, T), reduction="batchmean")


def mean_without_square(s, t, T=1.0):
    return F.kl_div(log_soft(s, T), soft(t, T), reduction="none").mean()


def hard_teacher(s, t, T=1.0):
    return F.cross_entropy(s / T, t.argmax(-1))


def squared_logits(s, t, T=1.0):
    return F.mse_loss(s, t)


def teacher_attached(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="batchmean")


def student_detached(s, t, T=1.0):
    return kd(s.detach(), t, T)


def student_rebuilt(s, t, T=1.0):
    return kd(torch.tensor(s.tolist(), requires_grad=True), t, T)


def as_a_number(s, t, T=1.0):
    return kd(s, t, T).item()


def one_a_sentence(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="none").sum(-1)


def one_a_class(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t, T), reduction="none")


def no_default(s, t, T):
    return kd(s, t, T)


def other_default(s, t, T=2.0):
    return kd(s, t, T)


def fixed_temperature(s, t, T=1.0):
    return kd(s, t, 3.0)


def five_classes_only(s, t, T=1.0):
    return T**2 * 5 * F.kl_div(log_soft(s, T), soft(t.detach(), T), reduction="none").mean()


def batches_of_four_only(s, t, T=1.0):
    return T**2 * F.kl_div(log_soft(s, T), soft(t.detach(), T), reduction="sum") / 4


def scaled_in_place(s, t, T=1.0):
    s /= T
    return T**2 * F.kl_div(F.log_softmax(s, dim=-1), soft(t, T), reduction="batchmean")


def log_of_softmax(s, t, T=1.0):
    return T**2 * F.kl_div(soft(s, T).log(), soft(t.detach(), T), reduction="batchmean")


def log_with_a_small_number(s, t, T=1.0):
    return T**2 * F.kl_div((soft(s, T) + 1e-9).log(), soft(t.detach(), T), reduction="batchmean")


def log_of_a_clamp(s, t, T=1.0):
    return T**2 * F.kl_div(soft(s, T).clamp_min(1e-12).log(), soft(t.detach(), T), reduction="batchmean")


def comma_at_the_end(s, t, T=1.0):
    return (kd(s, t, T),)


def without_return(s, t, T=1.0):
    kd(s, t, T)


def zero(s, t, T=1.0):
    return torch.tensor(0.0)


def wrong_sign(s, t, T=1.0):
    return -kd(s, t, T)


def double_precision(s, t, T=1.0):
    return kd(s.double(), t.double(), T)


def log_softmax_twice(s, t, T=1.0):  # idempotent, so right
    return T**2 * F.kl_div(log_soft(log_soft(s, T)), soft(t.detach(), T), reduction="batchmean")


def by_hand(s, t, T=1.0):
    with torch.no_grad():
        log_t = log_soft(t, T)
    return T * T * (log_t.exp() * (log_t - log_soft(s, T))).sum() / len(s)


def cross_entropy_minus_entropy(s, t, T=1.0):
    p = soft(t.detach(), T)
    return T**2 * (F.cross_entropy(s / T, p) - torch.special.entr(p).sum(-1).mean())


def by_distributions(s, t, T=1.0):
    Categorical = torch.distributions.Categorical
    kl = torch.distributions.kl_divergence(Categorical(logits=t.detach() / T), Categorical(logits=s / T))
    return kl.mean() * T**2


# -- logit_matching_loss -----------------------------------------------------------------------------------


def centred(z, dim=-1):
    return z - z.mean(dim, keepdim=True)


def matching_by_variance(s, t):
    return (s - t).var(-1, unbiased=False).mean() / 2


# -- repair_the_blog_formula -------------------------------------------------------------------------------


def both(s, t, y, T=1.0, a=0.5, ce=F.cross_entropy, soft_loss=kd):
    return a * ce(s, y) + (1 - a) * soft_loss(s, t, T)


def blog(s, t, y, T=1.0, a=0.5):
    p_s, p_t = soft(s), soft(t)
    rows = torch.arange(len(y))
    return (-a * p_s[rows, y].log() - (1 - a) * p_t[rows, y].log()).mean()


def blog_sum(s, t, y, T=1.0, a=0.5):
    return a * F.cross_entropy(s, y, reduction="sum") + (1 - a) * F.cross_entropy(t, y, reduction="sum")


def blog_softened(s, t, y, T=1.0, a=0.5):
    return a * F.cross_entropy(s, y) + (1 - a) * F.cross_entropy(t / T, y)


MUTANTS = {
    "softened_probabilities": [
        (lambda z, T: z.softmax(-1), "not divided by the temperature"),
        (lambda z, T: (z * T).softmax(-1), "multiplied by T"),
        (lambda z, T: (z / T).softmax(0), "dim=0"),
        (lambda z, T: (z / T).log_softmax(-1), "not log_softmax"),
        (lambda z, T: z / T, "softmax is missing"),
        (lambda z, T: z.softmax(-1) / T, "divide the logits"),
        (lambda z, T: z.softmax(-1) ** (1 / T), "sum to 1"),
        (lambda z, T: (z / T).exp(), "divided by its sum"),
        (lambda z, T: (z / T**2).softmax(-1), "T²"),
        (naive_exponentials, "NaN or infinity"),
        (sigmoid_of_the_difference, "shape"),
        (in_place, "in place"),
        (lambda z, T: (z * T).log_softmax(-1), "and you return log-probabilities"),
        (lambda z, T: (z / T).softmax(-1).detach(), "no gradient"),
        (lambda z, T: (z / T).softmax(-1).double(), "float64"),
        (lambda z, T: (z / T).softmax(-1).tolist(), "should be a tensor"),
    ],
    "kd_gradient": [
        (lambda s, t, T: T * (soft(t, T) - soft(s, T)) / len(s), "sign"),
        (lambda s, t, T: (soft(s, T) - soft(t, T)) / len(s), "factor T is missing"),
        (lambda s, t, T: T**2 * (soft(s, T) - soft(t, T)) / len(s), "factor is T²"),
        (lambda s, t, T: (soft(s, T) - soft(t, T)) / T / len(s), "1/T"),
        (lambda s, t, T: T * (soft(s, T) - soft(t, T)), "divide by B"),
        (lambda s, t, T: T * (soft(s, T) - soft(t, T)) / s.numel(), "classes too"),
        (lambda s, t, T: T * (soft(s, T) - soft(t, T)) / s.shape[1], "divide by the batch size"),
        (lambda s, t, T: T * (soft(s) - soft(t)) / len(s), "not divided by the temperature"),
        (lambda s, t, T: T * (soft(s, T) - soft(t)) / len(s), "only the student's"),
        (lambda s, t, T: T * (soft(s) - soft(t, T)) / len(s), "only the teacher's"),
        (lambda s, t, T: T * (log_soft(s, T) - log_soft(t, T)) / len(s), "log-probabilities"),
        (lambda s, t, T: (s - t) / len(s), "subtract logits"),
        (lambda s, t, T: T * (soft(s, T) - F.one_hot(t.argmax(-1), s.shape[1])) / len(s), "most likely"),
        (lambda s, t, T: (soft(t, T) - soft(s, T)) / len(s), "first; and the factor"),
        (lambda s, t, T: (T * (soft(s, T) - soft(t, T)) / len(s)).sum(-1), "shape"),
        (lambda s, t, T: T * (soft(s, T) - soft(t, T)) / 4, "constant factor"),
        (softened_in_place, "changes its input `s` in place"),
    ],
    "soft_target_loss": [
        (reversed_kl, "reversed"),
        (mean_of_everything, "batchmean"),
        (sum_of_everything, "sum over the batch"),
        (no_square, "T² is missing"),
        (factor_t, "should be T²"),
        (inverted_square, "divide by T²; multiply"),
        (probabilities_first, "log_softmax"),
        (double_softmax, "softmax twice"),
        (double_softmax_teacher, "softmax twice"),
        (two_log_softmaxes_with_t, "divided by T twice"),
        (log_target_forgotten, "log_target=True"),
        (teacher_unsoftened, "only the student's logits"),
        (student_unsoftened, "only the teacher's logits"),
        (temperature_ignored, "not divided by the temperature"),
        (times_temperature, "multiplied by T"),
        (soft_cross_entropy, "cross-entropy"),
        (over_the_batch, "dim=0"),
        (reversed_without_square, "and the factor T² is missing"),
        (mean_without_square, "K times too small"),
        (hard_teacher, "most likely class"),
        (squared_logits, "squared difference of the logits"),
        (student_detached, "no gradient"),
        (student_rebuilt, "does not depend"),
        (as_a_number, "float"),
        (one_a_sentence, "mean over the batch"),
        (one_a_class, "sum over the classes"),
        (no_default, "temperature=1.0"),
        (other_default, "T = 1"),
        (fixed_temperature, "same at every temperature"),
        (five_classes_only, "number of classes is always 5"),
        (batches_of_four_only, "batch size is always 4"),
        (scaled_in_place, "in place"),
        (log_of_softmax, "log_softmax"),
        (log_with_a_small_number, "and 900 is right"),
        (log_of_a_clamp, "a clamp, or a small number"),
        (comma_at_the_end, "a comma at the end"),
        (without_return, "return"),
        (zero, "is 0 whatever the batch"),
        (wrong_sign, "sign"),
        (double_precision, "float64"),
    ],
    "logit_matching_loss": [
        (lambda s, t: F.mse_loss(s, t) / 2, "not centred"),
        (lambda s, t: F.mse_loss(centred(s), centred(t)), "½"),
        (lambda s, t: (centred(s) - centred(t)).square().sum(-1).mean() / 2, "K times too large"),
        (lambda s, t: (centred(s) - centred(t)).square().sum() / (2 * s.shape[1]), "B times too large"),
        (lambda s, t: F.mse_loss(centred(s), t) / 2, "only the student's"),
        (lambda s, t: F.mse_loss(s, centred(t)) / 2, "only the teacher's"),
        (lambda s, t: F.mse_loss(centred(s, 0), centred(t, 0)) / 2, "dim=0"),
        (lambda s, t: F.mse_loss(s - s.mean(), t - t.mean()) / 2, "whole batch"),
        (lambda s, t: F.mse_loss(s, t), "not centred"),
        (lambda s, t: (centred(s) - centred(t)).abs().mean() / 2, "absolute"),
        (lambda s, t: F.mse_loss(soft(s), soft(t)), "differs"),
        (lambda s, t: F.mse_loss(centred(s), centred(t), reduction="none") / 2, "classes"),
        (lambda s, t: F.mse_loss(centred(s).detach(), centred(t)) / 2, "no gradient"),
        (lambda s, t: (F.mse_loss(centred(s), centred(t)) / 2).item(), "float"),
        (lambda s, t: F.mse_loss(s.sub_(s.mean(-1, keepdim=True)), centred(t)) / 2, "in place"),
    ],
    "repair_the_blog_formula": [
        (blog, "blog formula"),
        (blog_sum, "blog formula"),
        (blog_softened, "blog formula"),
        (lambda s, t, y, T, a: both(s, t, y, T, 1 - a), "changed places"),
        (lambda s, t, y, T, a: F.cross_entropy(s, y) + kd(s, t, T), "not weighted"),
        (lambda s, t, y, T, a: both(s / T, t / T, y, 1.0, a), "softened by T"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=no_square), "T² is missing"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=reversed_kl), "reversed"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=mean_of_everything), "K times too small"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=teacher_unsoftened), "only the student's"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=soft_cross_entropy), "cross-entropy"),
        (lambda s, t, y, T, a: a * F.cross_entropy(s, y), "soft targets are missing"),
        (lambda s, t, y, T, a: (1 - a) * kd(s, t, T), "labels are missing"),
        (lambda s, t, y, T, a: both(s, t, t.argmax(-1), T, a), "teacher's guesses"),
        (lambda s, t, y, T, a: a * F.cross_entropy(soft(s), y) + (1 - a) * kd(s, t, T), "wants the logits"),
        (lambda s, t, y, T, a: both(s.detach(), t, y, T, a), "no gradient"),
        (lambda s, t, y, T, a: both(s, t, y, T), "whatever alpha"),
        (lambda s, t, y, T, a: a * F.cross_entropy(s, y) + (1 - a) * kd(s.detach(), t, T), "its gradient"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=log_of_softmax), "log_softmax"),
        (lambda s, t, y, T, a: both(s, t, y, T, a, soft_loss=log_of_a_clamp), "a clamp, or a small number"),
        (lambda s, t, y, T, a: both(s.sub_(s.mean(-1, keepdim=True)), t, y, T, a), "changes its input `s` in place"),
    ],
}
RIGHT = {
    "softened_probabilities": [soft, stable_by_hand, lambda z, T: torch.exp(log_soft(z, T))],
    "kd_gradient": [
        lambda s, t, T: T * (soft(s, T) - soft(t, T)) / len(s),
        lambda s, t, T: (soft(t, T) - soft(s, T)).mul(-T).div(s.size(0)),
        by_autograd,
        by_backward,
    ],
    "soft_target_loss": [
        teacher_attached,
        kd,
        log_softmax_twice,
        by_hand,
        cross_entropy_minus_entropy,
        by_distributions,
    ],
    "logit_matching_loss": [
        lambda s, t: F.mse_loss(centred(s), centred(t)) / 2,
        lambda s, t: centred(s - t).square().mean() / 2,
        matching_by_variance,
    ],
    "repair_the_blog_formula": [
        both,
        lambda s, t, y, T=1.0, a=0.5: a * F.nll_loss(log_soft(s), y) + (1 - a) * by_hand(s, t, T),
        lambda student, teacher, labels, temperature, alpha: torch.lerp(
            kd(student, teacher, temperature), F.cross_entropy(student, labels), alpha
        ),
    ],
}
