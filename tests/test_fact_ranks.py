"""Ranks of objects: against Hugging Face's own loss, text by text, and what they come to in metrics."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from memray.corpus_trial import SampleQuestion
from memray.encoding import Batch
from memray.fact_ranks import asked_samples, facts_of, measure_facts, object_ranks, ranks_of_first, score_objects
from memray.finetune import scoring_passes
from memray.generators import fact_table, objects
from memray.generators.facts import RELATIONS
from memray.looks import Looker
from memray.measurement import samples_table
from memray.models import load_model, load_tokenizer
from memray.sample_measurement import remeasure_samples
from memray.samples import HELD_OUT, NATIVE, prepare_samples
from memray.scoring import TokenScores, score
from memray.spec import TrialSpec
from memray.sweep import InvalidCell, vary
from memray.trial import run_trial

from .test_corpus_trial import changed

SPEC = TrialSpec.model_validate(
    {
        "corpus": {"rows": {"generator": "facts"}, "num_samples": 12},
        "model": {"size": "tiny-text"},
        "training": {"epochs": 4, "strings_per_step": 4, "learning_rate": 3e-3},
        "probes": {"epochs": (0, 2), "num_held_out": 8, "facts": {"num_facts": 3, "epochs": (2,)}},
    }
)


def test_ranks_are_those_of_the_loss_of_every_object_in_every_template() -> None:
    samples = prepare_samples(SPEC)
    model = load_model(SPEC.model, seed=1)
    asked = asked_samples(SPEC, samples.known)
    assert [samples.known[index].role for index in asked] == [NATIVE] * 3 + [HELD_OUT] * 3

    def scored(batch):
        return TokenScores.concatenate([score(model, part, samples.alphabet) for part in scoring_passes(batch)])

    found = object_ranks(SPEC, samples.known, score_objects(SPEC, samples, scored))
    tokenizer = load_tokenizer(SPEC.model)
    assert [*found] == asked
    table = fact_table(2000, SPEC.string_seed)
    trained = [table[samples.known[index].place] for index in asked[:3]]
    for index, ranks in found.items():
        known = samples.known[index]
        fact = table[known.place]
        assert known.text.reference == f"{fact.object}."
        if known.role == HELD_OUT:  # asked about the object of a trained fact, where one has its relation
            candidates = [each.object for each in trained if each.relation == fact.relation]
            fact = fact._replace(object=candidates[0] if candidates else fact.object)
        for template, rank in enumerate(ranks):
            losses = {}
            for candidate in objects(fact.relation):
                text = fact._replace(object=candidate).sample(template)
                prompt = tokenizer(text.prefix)["input_ids"]
                ids = torch.tensor([prompt + tokenizer(text.reference)["input_ids"]])
                labels = torch.where(torch.arange(ids.shape[1]) >= len(prompt), ids, -100)
                with torch.no_grad():
                    loss = model(ids, labels=labels).loss.item()
                losses[candidate] = loss * (ids.shape[1] - len(prompt))
            assert rank == 1 + sum(loss < losses[fact.object] for loss in losses.values())


@pytest.mark.parametrize("shares", [2, 3, 90])
def test_shares_of_a_look_join_to_the_same_scores_to_the_last_bit(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memray.finetune.TOKENS_PER_SCORING_PASS", 512)  # so that there are many passes
    samples, model = prepare_samples(SPEC), load_model(SPEC.model, seed=1)

    def scored(batch: Batch) -> TokenScores:
        return TokenScores.concatenate([score(model, part, samples.alphabet) for part in scoring_passes(batch)])

    whole = score_objects(SPEC, samples, scored)
    looker = Looker(spec=SPEC, material=samples, score=scored, repeat=None, model=model)
    question = SampleQuestion.of(SPEC, 2)
    joined = question.join([share.answer(looker) for share in question.split(shares)]).objects
    assert joined is not None
    order, own = np.argsort(whole.text), np.argsort(joined.text)
    assert whole.log_prob[order].tobytes() == joined.log_prob[own].tobytes()
    assert joined.text[own].tolist() == list(range(6 * 4 * 32))


def test_a_tie_is_no_knowledge() -> None:
    log_prob = np.array([[[-1.0, -1.0, -2.0], [-1.0, -3.0, -2.0], [-5.0, -1.0, -2.0]]])
    assert ranks_of_first(log_prob).tolist() == [[2, 1, 3]]


def test_a_model_that_knows_only_which_objects_are_frequent_knows_no_fact() -> None:
    spec = changed(SPEC, corpus__num_samples=480, probes__num_held_out=96, probes__facts={"num_facts": 96})
    samples = prepare_samples(spec)
    trained = Counter(each.text.reference for each in samples.known if each.role == NATIVE)

    def by_frequency(batch: Batch) -> TokenScores:
        """Each text as likely as its object is frequent in training."""
        texts = [
            str(samples.tokenizer.decode(ids[mask.bool()]))
            for ids, mask in zip(batch.ids, batch.attention_mask, strict=True)
        ]
        frequency = [
            next(number for object_, number in known.items() if text.endswith(" " + object_)) for text in texts
        ]
        number = len(texts)
        names = ("position", "log_mass", "argmax", "rank", "margin", "entropy_bits", "kl_bits")
        types = {name: np.int32 if name in ("position", "argmax", "rank") else np.float32 for name in names}
        return TokenScores(
            string=np.arange(number, dtype=np.int32), log_prob=np.array(frequency, dtype=np.float32),
            mean_q=np.zeros((number, 0)), **{name: np.zeros(number, types[name]) for name in names},
        )  # fmt: skip

    known = {f"{each}.": trained[f"{each}."] for name in RELATIONS for each in objects(name)}
    ranks = object_ranks(spec, samples.known, score_objects(spec, samples, by_frequency))
    role = np.array([each.role for each in samples.known])
    place = np.array([each.place for each in samples.known])
    metrics = measure_facts(spec, role, place, ranks)
    # Frequent objects rank well, of trained facts and of others alike.
    assert metrics["facts/rank_unseen"] < 15.5
    assert metrics["facts/rank_unseen_controls"] == pytest.approx(metrics["facts/rank_unseen"], abs=0.5)


def test_a_fact_that_fits_in_no_other_words_is_refused_before_it_is_trained() -> None:
    fits = changed(SPEC, corpus__max_tokens=22)
    prepare_samples(fits)
    with pytest.raises(ValueError, match=r"a sample must have at most corpus.max_tokens tokens"):
        run_trial(fits)


def test_a_model_that_diverged_knows_nothing() -> None:
    assert ranks_of_first(np.full((1, 1, 32), np.nan)).tolist() == [[32]]


@pytest.mark.parametrize("num_templates", [1, 4])
def test_templates_in_which_a_fact_was_told_are_apart_from_the_others(num_templates: int) -> None:
    spec = changed(SPEC, corpus__rows__options={"num_templates": num_templates})
    facts = facts_of(spec)
    place = np.array([0, 6, 13, 19])  # subjects 0, 1, 2 and 3
    told = [facts.template_of(each) for each in place.tolist()]
    assert told == ([0] * 4 if num_templates == 1 else [0, 1, 2, 3])
    ranks = {index: [1 if each == template else 5 + index for each in range(4)] for index, template in enumerate(told)}
    role = np.array([NATIVE, NATIVE, HELD_OUT, HELD_OUT])
    assert measure_facts(spec, role, place, ranks) == {
        "facts/rank_told": 1.0,
        "facts/rank_unseen": 5.5,
        "facts/rank_told_controls": 1.0,
        "facts/rank_unseen_controls": 7.5,
    }


def test_a_trial_ranks_objects_where_it_is_asked_to_and_learns_those_that_it_was_told() -> None:
    spec = changed(SPEC, training__epochs=25)
    first, middle, last = measurements = list(run_trial(spec))
    assert "facts/rank_told" not in first.metrics
    assert middle.metrics["facts/rank_told"] > last.metrics["facts/rank_told"]
    assert last.metrics["facts/rank_told"] < 3
    # Of two facts of a relation, an object that was trained is near the top whatever it is asked for.
    assert last.metrics["facts/rank_told"] < last.metrics["facts/rank_told_controls"] < 6
    again = remeasure_samples(spec, samples_table(measurements))
    assert [each.record() for each in again] == [each.record() for each in measurements]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"corpus.rows": {"generator": "questions"}}, "corpus.rows.generator must be 'facts', but got 'questions'"),
        ({"probes.facts": {"num_facts": 9}}, r"facts.num_facts <= num_held_out must hold, but got 9 > 8"),
        ({"corpus.num_samples": 2, "training.strings_per_step": 1}, r"at most corpus.num_samples, but got 3 > 2"),
        ({"probes.epochs": (0,)}, r"probes.facts.epochs must be among probes.epochs, but \[2\] are not"),
        ({"probes.embeddings": {}, "probes.epochs": (2,)}, "must begin with 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(changes: dict, sentence: str) -> None:
    found = vary(SPEC, changes)
    assert isinstance(found, InvalidCell)
    assert re.search(sentence, found.reason)
