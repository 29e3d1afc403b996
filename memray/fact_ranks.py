"""Whether a model knows a fact, and not only the words that it was told in: the rank of the object among all objects of
its relation, under every template.

A fact that is recalled in wording alone has a low rank under its own template and ranks by chance under the others,
as do facts that were never told.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from jaxtyping import Float64, Int
from numpy import ndarray

from memray.encoding import Batch
from memray.finetune import share_of_passes
from memray.generators import Facts, Sample, fact_table, generator, objects
from memray.generators.facts import NUM_TEMPLATES, RELATIONS
from memray.samples import HELD_OUT, NATIVE, KnownSample, Samples, encode_texts
from memray.scoring import TokenScores
from memray.spec import TrialSpec


def facts_of(spec: TrialSpec) -> Facts:
    """The generator that told a trial its facts."""
    assert spec.corpus is not None
    assert spec.corpus.rows.generator is not None
    found = generator(spec.corpus.rows.generator, **spec.corpus.rows.options)
    assert isinstance(found, Facts)
    return found


def asked_samples(spec: TrialSpec, known: Sequence[KnownSample]) -> list[int]:
    """The samples that are asked about: the first that are trained, and the first that are held out."""
    assert spec.probes.facts is not None
    number = spec.probes.facts.num_facts
    return [
        index
        for role in (NATIVE, HELD_OUT)
        for index in [i for i, sample in enumerate(known) if sample.role == role][:number]
    ]


@dataclass(frozen=True)
class ObjectScores:
    """How likely objects are after the words of a template.

    Attributes:
        text: Which of the texts that are asked about,
        log_prob: and the sum over the tokens of its object, nats.
    """

    text: Int[ndarray, " texts"]
    log_prob: Float64[ndarray, " texts"]

    @staticmethod
    def concatenate(parts: "Sequence[ObjectScores]") -> "ObjectScores":
        return ObjectScores(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("text", "log_prob")))


def score_objects(
    spec: TrialSpec, samples: Samples, score: Callable[[Batch], TokenScores], *, share: int = 0, shares: int = 1
) -> ObjectScores:
    """Scores every object of a fact's relation under every template; of several shares every so-manieth pass."""
    batch = encode_texts(spec, samples, _questions(spec, samples.known)[1])
    order = np.argsort(-batch.attention_mask.sum(1).numpy(), kind="stable")  # full passes
    batch = batch.of(order)
    own = share_of_passes(batch, share, shares)
    if own is None:
        return ObjectScores(order[:0], np.empty(0))
    scores = score(batch.of(own))
    log_prob = np.bincount(scores.string, weights=scores.log_prob.astype(np.float64), minlength=len(own))
    return ObjectScores(order[own], log_prob)


def object_ranks(spec: TrialSpec, known: Sequence[KnownSample], scores: ObjectScores) -> dict[int, list[int]]:
    """The rank of each fact's object under each template, by sample: 1 is the best of all objects of its relation.

    One that is exactly as likely as others stands behind them. Of a held-out fact it is the object of a trained one:
    objects that occur in training are likely whatever they are asked for, and controls must be the same objects.

    Args:
        scores: Of all texts.
    """
    asked = asked_samples(spec, known)
    log_prob = np.empty(len(scores.text))
    log_prob[scores.text] = scores.log_prob
    ranks = ranks_of_first(log_prob.reshape(len(asked), NUM_TEMPLATES, -1))
    return dict(zip(asked, ranks.tolist(), strict=True))


def check_facts(spec: TrialSpec, samples: Samples) -> None:
    """Refuses a trial of which a fact does not fit in the words of another template: it would fail after training.

    Raises:
        ValueError: If so.
    """
    if spec.probes.facts is not None:
        encode_texts(spec, samples, _questions(spec, samples.known)[1])


def _questions(spec: TrialSpec, known: Sequence[KnownSample]) -> tuple[list[int], list[Sample]]:
    """The samples that are asked about, and their texts: by sample, template and candidate, the object to be ranked
    first."""
    asked = asked_samples(spec, known)
    table = fact_table(1 + max(known[index].place for index in asked), spec.string_seed)
    facts = [table[known[index].place] for index in asked]
    trained = facts[: len(facts) // 2]
    of_relation = {name: cycle([each.object for each in trained if each.relation == name]) for name in RELATIONS}
    named = [*trained, *(fact._replace(object=next(of_relation[fact.relation], fact.object))
                         for fact in facts[len(trained) :])]  # fmt: skip
    texts = [
        fact._replace(object=candidate).sample(template)
        for fact in named
        for template in range(NUM_TEMPLATES)
        for candidate in [fact.object, *(each for each in objects(fact.relation) if each != fact.object)]
    ]
    return asked, texts


def ranks_of_first(
    log_prob: Float64[ndarray, "facts templates candidates"],
) -> Int[ndarray, "facts templates"]:
    """How many candidates are at least as likely as the first, itself included."""
    # Of a model that diverged none is less likely.
    return (~(log_prob < log_prob[..., :1])).sum(-1)


def measure_facts(
    spec: TrialSpec, role: ndarray, place: Int[ndarray, " samples"], ranks: Mapping[int, Sequence[int]]
) -> dict[str, float]:
    """Mean ranks by key: of trained facts under their own template and under the others, and of held-out facts under
    the others of the template that would have been theirs."""
    generator = facts_of(spec)
    told: dict[str, list[float]] = {}
    for index, own in ranks.items():
        template = generator.template_of(int(place[index]))
        controls = "" if role[index] == NATIVE else "_controls"
        others = [rank for each, rank in enumerate(own) if each != template]
        told.setdefault(f"facts/rank_told{controls}", []).append(own[template])
        told.setdefault(f"facts/rank_unseen{controls}", []).append(float(np.mean(others)))
    return {key: float(np.mean(values)) for key, values in told.items()}
