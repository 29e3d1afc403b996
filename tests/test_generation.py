"""What a model says instead of a reference: the choice of samples, their continuations, and how near they come."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memray.corpus_trial import SampleQuestion
from memray.generation import chosen_samples, nearness, strata, weights_of
from memray.looks import Looker
from memray.measurement import samples_table
from memray.models import load_model
from memray.sample_measurement import remeasure_samples
from memray.samples import prepare_samples
from memray.spec import TrialSpec
from memray.trial import ModelShelf, run_trial

SPEC = TrialSpec.model_validate(
    {
        "corpus": {"rows": {"generator": "facts"}, "num_samples": 16},
        "model": {"size": "tiny-text"},
        "training": {"epochs": 14, "strings_per_step": 4, "learning_rate": 3e-3, "keep_weights": "final"},
        "probes": {"epochs": (0, 5), "num_held_out": 4, "generation": {"num_samples": 8, "checked_share": 1.0}},
    }
)


def test_strata_double():
    assert strata(np.array([0, 1, 2, 3, 4, 7, 8, 15, 16])).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 5))
def test_every_stratum_gives_as_many_as_there_are_or_as_the_others_give(lengths: list[int], number: int, seed: int):
    num_match = np.array(lengths)
    chosen = chosen_samples(num_match, number, seed=seed, epoch=3)
    assert len(set(chosen.tolist())) == len(chosen) == min(number, len(lengths))
    assert (np.diff(chosen) > 0).all()
    stratum = strata(num_match)
    counts = {each: (np.sum(stratum[chosen] == each), np.sum(stratum == each)) for each in np.unique(stratum)}
    most = max(taken for taken, _ in counts.values())
    for taken, there in counts.values():
        assert taken in (there, most, most - 1)
    assert chosen_samples(num_match, number, seed=seed, epoch=3).tolist() == chosen.tolist()


def test_weighted_by_their_strata_the_chosen_stand_for_all():
    rng = np.random.default_rng(0)
    num_match = rng.geometric(0.3, 4000) - 1
    value = 1.0 / (1 + strata(num_match))  # constant within a stratum: then the mean is exact
    chosen = chosen_samples(num_match, 60, seed=0, epoch=0)
    assert weights_of(num_match, chosen) @ value[chosen] == pytest.approx(value.mean(), rel=1e-12)
    assert abs(value[chosen].mean() - value.mean()) > 0.05  # unweighted it is not


def test_nearness_is_the_longest_common_subsequence_of_words_and_the_share_of_edits():
    assert nearness("the cat sat", "the cat sat") == {"rouge_l": 1.0, "levenshtein": 0.0}
    assert nearness("abcd", "wxyz") == {"rouge_l": 0.0, "levenshtein": 1.0}
    found = nearness("the cat sat on the mat", "the dog sat on a mat")
    assert found["rouge_l"] == pytest.approx(4 / 6)  # the, sat, on, mat: of six in either
    assert found["levenshtein"] == pytest.approx(6 / 22)
    assert nearness("kitten", "sitting")["levenshtein"] == pytest.approx(3 / 7)


def test_what_is_generated_begins_with_the_match_and_then_is_what_generate_says():
    *measurements, last = run_trial(SPEC, shelf=ModelShelf())
    samples = prepare_samples(SPEC)
    model = load_model(SPEC.model, seed=0)
    assert last.weights is not None
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in last.weights.items()})
    model.eval()
    assert last.samples is not None
    rows = last.samples.to_pylist()
    generated = [row for row in rows if row["continuation"] is not None]
    assert len(generated) == 8
    assert {row["role"] for row in generated} == {"native"}
    for row in rows[:16]:
        sample = samples.known[row["sample"]]
        prompt = torch.from_numpy(sample.prompt_ids)[None]
        whole = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(sample.reference_ids), do_sample=False,
            eos_token_id=None, pad_token_id=2,
        )[0, prompt.shape[1] :]  # fmt: skip
        wrong = np.flatnonzero(whole.numpy() != sample.reference_ids)
        assert row["generated_match"] == (wrong[0] if len(wrong) else len(whole))
        if row["continuation"] is not None:
            assert row["continuation"] == samples.tokenizer.decode(whole)
    assert last.metrics["generation/disagreement"] == 0.0
    assert 0 < last.metrics["generation/rouge_l"] < 1
    assert not [key for each in measurements for key in each.metrics if key.startswith("generation/")]
    again = remeasure_samples(SPEC, samples_table([*measurements, last]))
    assert again[-1].record() == last.record()


def test_a_match_length_that_does_not_hold_is_seen():
    """The last measurement of a trial, looked at by a model with other weights than those that it was scored with."""
    samples, asked = prepare_samples(SPEC), SampleQuestion.of(SPEC, 14)
    assert asked.generates
    assert asked.split(3) == [asked]
    model = load_model(SPEC.model, seed=0).eval()
    lies = load_model(SPEC.model, seed=0).eval()
    with torch.no_grad():
        head = lies.get_output_embeddings()
        assert head is not None
        head.weight.zero_()
        head.weight[:, 0] = torch.arange(2048.0)

    from memray.corpus_trial import measure_answer
    from memray.finetune import scoring_passes
    from memray.scoring import TokenScores, score

    def told_right(batch):  # every target right, which no model is
        scores = TokenScores.concatenate([score(model, part, samples.alphabet) for part in scoring_passes(batch)])
        scores.margin[:] = 1.0
        return scores

    looker = Looker(spec=SPEC, material=samples, score=told_right, repeat=None, model=lies)
    measured = measure_answer(SPEC, samples, 14, asked.answer(looker))
    assert measured.metrics["match/censored"] == 1.0
    assert measured.metrics["generation/disagreement"] == 1.0
