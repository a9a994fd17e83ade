"""Knowledge distillation: a student learns a frozen teacher's distributions (Hinton et al. 2015, arXiv:1503.02531).

loss = (1 - a) CE(y, z) + a T^2 D(softmax(z' / T) || softmax(z / T)),   z' the teacher's logits

    objective=DistillCausalLM(teacher=Pretrained(path="my/large"), alpha=0.5, temperature=2.0)
    objective=DistillClassification(teacher=Pretrained(path="my/tuned-bert"), divergence="jsd", beta=0.5)

Three objectives, one per kind of head; each is the plain objective of its head with a second term. D is the forward or the
reverse Kullback-Leibler divergence or the generalized Jensen-Shannon divergence of TRL's GKD (arXiv:2306.13649). Over a
vocabulary the logits of both models exist for one chunk of tokens at a time. The teacher is loaded once, has no gradient,
and is in no checkpoint and no export. Several are averaged (`ftjax.models.ensemble`). Terms for hidden values and for
attention can be added (`ftjax.objectives.hints`, `attention_hints`). A teacher can also be asked once, before training
(`top_k`, `cached`; `ftjax.train.recorded`): the step then neither runs nor holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from ftjax.data.labels import LabelBatch
from ftjax.kernels.vocab_loss import over_pairs
from ftjax.objectives.attention_hints import AttentionHints
from ftjax.objectives.base import LossOutput, Policy, token_count
from ftjax.objectives.causal_lm import CausalLM, shift
from ftjax.objectives.classification import Classification, smoothed
from ftjax.objectives.masked_lm import MaskedLM
from ftjax.objectives.recorded import top_k, top_k_tokens
from ftjax.registry import register
from ftjax.schema import Default, Slot


def kl(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, from log-probabilities."""
    return (jnp.exp(p) * (p - q)).sum(-1)


def jensen_shannon(teacher: jax.Array, student: jax.Array, beta: jax.Array | float) -> jax.Array:
    """beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s  (arXiv:2306.13649, eq. 1), 0 < beta < 1."""
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


DIVERGENCES: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "forward_kl": lambda teacher, student, beta: kl(teacher, student),
    "reverse_kl": lambda teacher, student, beta: kl(student, teacher),
    "jsd": jensen_shannon,
}
"""Divergence over the last axis of (teacher's, student's) log-probabilities, and beta."""


class Distilled(AttentionHints):
    """What the three objectives have in common: the teacher and the distance from it."""

    teacher: Annotated[Any, Slot("model"), Field(description="The frozen model that is learned from.")] = Default(
        "model", "pretrained"
    )
    teachers: tuple[Annotated[Any, Slot("model")], ...] = Field(
        (), description="Further frozen models; the student learns from the mean of all."
    )
    mean: Literal["logits", "probabilities"] = Field(
        "logits", description="Of several teachers: the mean of their logits, or of their distributions before T."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Share of the divergence in the loss; the labels have the rest.")
    temperature: float = Field(2.0, gt=0, description="T, which divides both logits in the divergence.")
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl", description="forward_kl: KL(teacher || student); jsd: generalized Jensen-Shannon, with beta."
    )
    beta: float = Field(0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture.")

    @property
    def records(self) -> bool:
        """Whether the teacher is asked once, before training, and its words come with the batches."""
        return False

    def shares(self, hard: str) -> dict[str, float]:
        """Factors of the labels' term, of the divergence, and of the hidden values where they are compared."""
        return {hard: 1 - self.alpha, "divergence": self.alpha} | self.hint_share()

    def numbers(self) -> dict[str, float]:
        """Numbers of the divergence that enter the step as arrays."""
        return {"temperature": self.temperature, "beta": self.beta}

    def distance(self, teacher: jax.Array, student: jax.Array, hyper: dict) -> jax.Array:
        """T^2 D of one-of-many logits [..., C] -> [...]; the square keeps gradients of one size whatever T is."""
        t, s = (jax.nn.log_softmax(z / hyper["temperature"], axis=-1) for z in (teacher, student))
        return hyper["temperature"] ** 2 * DIVERGENCES[self.divergence](t, s, hyper["beta"])

    def distance_each(self, teacher: jax.Array, student: jax.Array, hyper: dict) -> jax.Array:
        """The same for independent yes-or-no logits [..., C] -> [...]: the mean over their two-way distributions."""
        t, s = (jnp.stack([z, jnp.zeros_like(z)], axis=-1) for z in (teacher, student))
        return self.distance(t, s, hyper).mean(-1)

    def tokens(self, student: Any, teacher: Any, targets: jax.Array, hyper: dict) -> Any:
        """(nll, T^2 D, whether the target is the likeliest) of each token [B, T], in chunks."""
        smoothing = hyper.get("label_smoothing", 0.0)

        def one(z: jax.Array, known: jax.Array, y: jax.Array) -> Any:
            picked = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
            return smoothed(z, y, smoothing), self.distance(known, z, hyper), (picked >= z.max(-1)).astype(jnp.float32)

        return over_pairs(one, student.head, student.hidden, teacher.head, teacher.hidden, targets, chunk=student.chunk)

    def language(self, output: Any, teacher: Any, targets: jax.Array, weights: jax.Array, hyper: dict) -> Any:
        """(loss terms, accuracy) of weighted tokens [B, T]."""
        return self.summed(self.tokens(output, teacher, targets, hyper), weights)

    def summed(self, each: Any, weights: jax.Array) -> Any:
        """(loss terms, accuracy) from what `tokens` gives."""
        nll, distance, right = each
        trained = (weights > 0).astype(jnp.float32)
        sums = {"nll": (nll * weights).sum(), "divergence": (distance * weights).sum()}
        return sums, {"mean_token_accuracy": ((right * trained).sum(), trained.sum())}

    def check(self, run: Any) -> Iterator[str]:
        """There is a teacher, and it is used."""
        for teacher in (self.teacher, *self.teachers):
            if hasattr(teacher, "path"):
                continue
            yield f"objective.teacher={teacher.name}  a teacher is a model that was trained; use pretrained"
        if not self.records:
            return
        for term in self.hint_share():
            yield f"objective.{term}={getattr(self, term):g}  it needs a teacher at every step, not one that is asked once"
        if getattr(run.peft, "batches_for_start", 0):
            yield f"peft={run.peft.name}  begins with gradients, before the teacher is asked; ask it at every step"

    def advise(self, run: Any) -> Iterator[str]:
        """Settings that are probably not meant."""
        yield from self.advise_hints()
        if self.alpha == 0 and not self.hint_share():
            yield "objective.alpha=0.0  the teacher is computed and has no effect"
        if self.teacher == run.model:
            yield f"objective.teacher.path={self.teacher.path}  is the model that is trained: it learns from its own start"


@register("objective")
class DistillCausalLM(Distilled, CausalLM):
    """Next tokens, from the data and from a teacher's distributions."""

    name: Literal["distill_causal_lm"] = "distill_causal_lm"  # type: ignore[assignment]
    top_k: int = Field(
        0,
        ge=0,
        description="Ask the teacher once, before training, and keep this many of its likeliest tokens; 0: every step.",
    )

    @property
    def records(self) -> bool:
        """Whether the likeliest tokens come with the batches."""
        return self.top_k > 0

    def record(self, output: Any) -> dict[str, jax.Array]:
        """What is kept of the teacher's output."""
        return top_k(output, self.top_k)

    def check(self, run: Any) -> Iterator[str]:
        """A teacher, and no third term."""
        yield from Distilled.check(self, run)
        if self.top_k and self.divergence != "forward_kl":
            yield (
                f"objective.top_k={self.top_k}  objective.divergence={self.divergence} needs the teacher's share of every "
                "token; with top_k use forward_kl"
            )
        if self.z_loss:
            yield f"objective.z_loss={self.z_loss:g}  distillation has no such term; set it to 0"

    def coefficients(self) -> dict[str, float]:
        """The data's tokens and the teacher's."""
        return self.shares("nll")

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return CausalLM.hyper(self) | self.numbers()

    def weights(self, batch: Any) -> dict[str, jax.Array]:
        """Trained tokens, for both terms."""
        return dict.fromkeys(("nll", "divergence"), shift(batch)[1].sum()) | self.hint_weight(batch)

    def __call__(self, policy: Policy, batch: Any, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the trained tokens; `reference` is the teacher, None where the batch has its likeliest tokens."""
        output, mutable = policy(self.inputs(batch), mutable, **self.watched())
        targets, weights = shift(batch)
        if self.top_k:
            told = {"temperature": hyper["temperature"], "smoothing": hyper.get("label_smoothing", 0.0)}
            each = top_k_tokens(output, targets, batch.top_ids, batch.top_log_p, **told)
            sums, found = self.summed(each, weights)
        else:
            known = reference(self.inputs(batch), **self.watched(teacher=True))
            sums, found = self.language(output, known, targets, weights, hyper)
            sums |= self.hint(output, known, batch, hyper)
        return LossOutput(sums, mutable, found | {"num_tokens": (weights.sum(), jnp.float32(1))})


@register("objective")
class DistillMaskedLM(Distilled, MaskedLM):
    """Hidden tokens, from the text and from a teacher's distributions."""

    name: Literal["distill_masked_lm"] = "distill_masked_lm"  # type: ignore[assignment]

    def coefficients(self) -> dict[str, float]:
        """The text's tokens and the teacher's."""
        return self.shares("nll")

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return self.numbers()

    def weights(self, batch: Any) -> dict[str, jax.Array]:
        """Chosen tokens, for both terms."""
        count: jax.Array = self._chosen(batch)[0].sum()
        return {"nll": count, "divergence": count} | self.hint_weight(batch)

    def __call__(self, policy: Policy, batch: Any, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the chosen tokens; `reference` is the teacher."""
        output, mutable = policy(self.inputs(batch), mutable, **self.watched())
        known = reference(self.inputs(batch), **self.watched(teacher=True))
        weights, at = self._chosen(batch)
        mine, theirs = (out.at(at) for out in (output, known))
        targets = jnp.take_along_axis(batch.targets, at, axis=1)
        sums, found = self.language(mine, theirs, targets, weights, hyper)
        sums |= self.hint(output, known, batch, hyper)
        return LossOutput(sums, mutable, found | {"num_tokens": token_count(batch.segments)})


@register("objective")
class DistillClassification(Distilled, Classification):
    """Classes of a text, from the labels and from a teacher's distributions."""

    name: Literal["distill_classification"] = "distill_classification"  # type: ignore[assignment]
    cached: bool = Field(False, description="Ask the teacher once, before training, and keep its logits of every text.")

    @property
    def records(self) -> bool:
        """Whether the teacher's logits come with the batches."""
        return self.cached

    def record(self, output: Any) -> dict[str, jax.Array]:
        """What is kept of the teacher's output."""
        return {"said": output.logits}

    def coefficients(self) -> dict[str, float]:
        """The labels and the teacher."""
        return self.shares("cross_entropy")

    def hyper(self) -> dict[str, float]:
        """Numbers of the objective that enter the step as arrays."""
        return Classification.hyper(self) | self.numbers()

    def weights(self, batch: LabelBatch) -> dict[str, jax.Array]:
        """Rows: by the weight of their class for the labels, plain for the teacher."""
        return Classification.weights(self, batch) | {"divergence": batch.weights.sum()} | self.hint_weight(batch)

    def __call__(self, policy: Policy, batch: LabelBatch, *, reference: Any, mutable: Any, hyper: dict) -> LossOutput:
        """Sums over the rows; `reference` is the teacher, None where the batch has its logits."""
        said: list[Any] = []

        def noted(inputs: Any, mutable: Any) -> Any:
            output, mutable = policy(inputs, mutable, **self.watched())
            said.append(output)
            return output, mutable

        out = Classification.__call__(self, noted, batch, reference=None, mutable=mutable, hyper=hyper)
        measure = self.distance_each if batch.labels.ndim == 2 else self.distance
        known = None if self.cached else reference(self.inputs(batch), **self.watched(teacher=True))
        logits = batch.said if known is None else jax.lax.stop_gradient(known.logits)  # pyright: ignore
        more = {"divergence": (measure(logits, out.rows["logits"], hyper) * batch.weights).sum()}
        more |= self.hint(said[0], known, batch, hyper)
        return out.replace(sums=out.sums | more)  # pyright: ignore
