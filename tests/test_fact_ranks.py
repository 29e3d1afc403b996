"""Ranks of objects: against Hugging Face's own loss, text by text, and what they come to in metrics."""

import re

import numpy as np
import pytest
import torch

from memray.fact_ranks import asked_samples, facts_of, measure_facts, object_ranks, ranks_of_first
from memray.finetune import scoring_passes
from memray.generators import fact_table, objects
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

    found = object_ranks(SPEC, samples, asked[1:4:2], scored)
    tokenizer = load_tokenizer(SPEC.model)
    assert [*found] == asked[1:4:2]
    for index, ranks in found.items():
        known = samples.known[index]
        fact = fact_table(2000, SPEC.string_seed)[known.place]
        assert known.text.reference == f"{fact.object}."
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


def test_a_tie_is_no_knowledge() -> None:
    log_prob = np.array([[[-1.0, -1.0, -2.0], [-1.0, -3.0, -2.0], [-5.0, -1.0, -2.0]]])
    assert ranks_of_first(log_prob).tolist() == [[2, 1, 3]]


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
    assert last.metrics["facts/rank_told_controls"] > 6
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
