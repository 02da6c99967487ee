"""Is a run collapsing? One sentence with the flags that help, from the latest lines of its log."""

import math


def _same_embedding(recent, remedies):
    """The sentence for embeddings that are all alike in all of the lines, or None."""
    if not all(line["embedding_std"] < 0.05 for line in recent):
        return None
    spread = f"standard deviation {recent[-1]['embedding_std']:.3f}, healthy is near 1"
    return f"collapse: all images have the same embedding ({spread}); {remedies}"


def diagnose(history: list[dict], num_prototypes: int) -> str | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss`, `code_entropy` (nats), `prototypes_used`,
    `embedding_std` and `batch` (samples that share one assignment problem). The remedies are the
    published ones ("Common issues" of the SwAV repository): a lower epsilon, prototypes frozen for
    longer, a queue that is shorter or starts later. Needs 10 lines, all of them in trouble, because a
    healthy run passes ln(K) too.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_prototypes < 2:
        return None
    ceiling = math.log(num_prototypes)
    remedies = "lower --epsilon (0.03), lower --base_lr, or freeze the prototypes for longer "
    found = _same_embedding(recent, remedies + "(--freeze_prototypes_niters)")
    if found:
        return found
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return (
            f"the loss stays at ln(K) = {ceiling:.3f}, what constant codes give; lower --epsilon "
            "(0.03), freeze the prototypes for longer (--freeze_prototypes_niters), use fewer "
            "prototypes (--nmb_prototypes), or a shorter or later queue (--queue_length, "
            "--epoch_queue_starts)"
        )
    if all(line["code_entropy"] > 0.99 * ceiling for line in recent):
        return (
            f"the codes are uniform (entropy {recent[-1]['code_entropy']:.2f} of at most "
            f"{ceiling:.2f}) and carry no signal; lower --epsilon (0.03)"
        )
    possible = min(num_prototypes, recent[-1]["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return (
            f"only {recent[-1]['prototypes_used']:.1f} of {possible} possible prototypes are in use; "
            "freeze the prototypes for longer (--freeze_prototypes_niters), lower --base_lr, or "
            "start the queue later (--epoch_queue_starts)"
        )
    return None


def diagnose_teacher(history: list[dict], num_outputs: int) -> str | None:
    """What is wrong with a run of self-distillation, as `diagnose`, or None.

    history: log lines with `teacher_entropy`, `student_kl`, `kl_to_uniform` (nats),
    `prototypes_used` and `embedding_std`. Collapse has two forms (section 5.6.3 of the thesis): uniform outputs, or one
    output that takes all; in both the student's KL to the teacher vanishes.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_outputs < 2:
        return None
    ceiling, last = math.log(num_outputs), recent[-1]
    if all(line["teacher_entropy"] > 0.99 * ceiling for line in recent):
        return (
            f"collapse: the teacher's output is uniform (entropy {last['teacher_entropy']:.2f} of at "
            f"most {ceiling:.2f}); lower --teacher_temp or --warmup_teacher_temp (0.02), or lower --lr"
        )
    if all(
        line["kl_to_uniform"] > 0.9 * ceiling or line["prototypes_used"] < 1.5 for line in recent
    ):
        return (
            f"collapse: one output takes all images (KL to uniform {last['kl_to_uniform']:.2f} of at "
            f"most {ceiling:.2f}, {last['prototypes_used']:.1f} outputs in use); let the center follow faster (--center_momentum 0.9), use a teacher "
            "with momentum (--momentum_teacher 0.996), or raise --teacher_temp"
        )
    if all(line["student_kl"] < 1e-3 * ceiling for line in recent):
        return (
            f"collapse: student and teacher give all crops the same output (KL {last['student_kl']:.4f}"
            "); use a teacher with momentum (--momentum_teacher 0.996 --momentum_teacher_end 1), "
            "lower --teacher_temp, or lower --lr"
        )
    if all(line["embedding_std"] < 0.05 for line in recent):
        return (
            "collapse: all images have the same features (standard deviation "
            f"{last['embedding_std']:.3f}); lower --lr, lower --teacher_temp, or use a teacher with "
            "momentum (--momentum_teacher 0.996 --momentum_teacher_end 1)"
        )
    return None


def diagnose_clusters(
    history: list[dict],
    num_prototypes: int,
    ceiling: float | None = None,
    lr: str = "--base_lr",
    clusters: str | None = "--nmb_prototypes",
) -> str | None:
    """What is wrong with a run that predicts pseudo-labels of all images, as `diagnose`, or None.

    history: log lines with `loss`, `prototypes_used` (by the predictions of a batch), `batch` and
    `embedding_std`. num_prototypes: of the head that these are of. ceiling: the loss of predicting
    nothing, ln(K) unless the heads differ. lr, clusters: the flags of the step size and of K,
    None where K is given by the method.
    """
    recent = history[-10:]
    if len(recent) < 10 or num_prototypes < 2:
        return None
    ceiling, last = math.log(num_prototypes) if ceiling is None else ceiling, recent[-1]
    found = _same_embedding(recent, f"lower {lr}")
    if found:
        return found
    fewer = f", or ask for fewer clusters ({clusters})" if clusters else ""
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return f"the loss stays at ln(K) = {ceiling:.3f}, what predicting nothing gives; change {lr}{fewer}"
    possible = min(num_prototypes, last["batch"])
    if possible >= 8 and all(line["prototypes_used"] < 0.05 * possible for line in recent):
        return (
            f"only {last['prototypes_used']:.1f} of {possible} possible clusters are predicted; lower "
            f"{lr}{fewer}"
        )
    return None


def diagnose_contrastive(history: list[dict], num_negatives: int) -> str | None:
    """What is wrong with a run, in one sentence that names the flags that help, or None.

    history: the latest log lines, oldest first, with `loss` and `embedding_std`. num_negatives: of a
    crop. Needs 10 lines, all of them in trouble. Identical embeddings give ln(1 + num_negatives).
    """
    recent = history[-10:]
    if len(recent) < 10:
        return None
    ceiling = math.log(1 + num_negatives)
    remedies = "lower --base_lr, lengthen --warmup_epochs, or lower --temperature (0.1)"
    found = _same_embedding(recent, remedies)
    if found:
        return found
    if all(abs(line["loss"] - ceiling) < 1e-3 * ceiling for line in recent):
        return (
            f"the loss stays at ln(1 + {num_negatives}) = {ceiling:.3f}, what identical embeddings "
            "give; lower --temperature (0.1), or change --base_lr"
        )
    return None
