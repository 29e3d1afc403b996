"""Embeddings of samples: against Hugging Face's own hidden states, across shares, and from records again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from memray.corpus_trial import SampleQuestion
from memray.embedding import NEAREST, TOGETHER, embed, encode
from memray.finetune import scoring_passes
from memray.looks import Looker
from memray.measurement import samples_table
from memray.measures.similarity import collapse, nearest_neighbour, similarity
from memray.models import load_model, text_tokenizer
from memray.sample_measurement import remeasure_samples
from memray.samples import HELD_OUT, Samples, prepare_samples
from memray.scoring import score
from memray.spec import TrialSpec
from memray.trial import run_trial

from .test_corpus_trial import changed

SPEC = TrialSpec.model_validate(
    {
        "corpus": {"rows": {"generator": "questions"}, "num_samples": 12},
        "model": {"size": "tiny-text"},
        "training": {"epochs": 3, "strings_per_step": 4, "learning_rate": 3e-3},
        "probes": {"epochs": (0, 1), "num_held_out": 4, "embeddings": {}},
    }
)


def every_row(samples: Samples) -> np.ndarray:
    return np.arange(len(samples.scored.ids))


@pytest.mark.parametrize("family", ["pythia", "llama2", "gpt2"])
def test_embeddings_are_means_of_the_last_hidden_states_of_each_text_alone(family: str) -> None:
    spec = changed(SPEC, model__family=family)
    samples = prepare_samples(spec)
    model = load_model(spec.model, seed=0)
    found = embed(model, samples, every_row(samples))
    assert found.sample.tolist() == list(range(16))
    assert found.prefix is not None
    skipped = int(family == "llama2")  # its BOS
    for index, sample in enumerate(samples.known):
        for ids, vector in ((sample.prompt_ids, found.prefix), (sample.ids, found.whole)):
            with torch.no_grad():
                states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[-1][0]
            np.testing.assert_allclose(vector[index], states[skipped:].mean(0).numpy(), atol=2e-5)


@pytest.mark.parametrize("shares", [2, 3, 40])
def test_shares_join_to_the_same_embeddings_to_the_last_bit(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memray.finetune.TOKENS_PER_SCORING_PASS", 64)  # so that there are many passes
    samples = prepare_samples(SPEC)
    model = load_model(SPEC.model, seed=0)

    def scored(batch: Any) -> Any:
        parts = [score(model, part, samples.alphabet) for part in scoring_passes(batch)]
        return type(parts[0]).concatenate(parts)

    looker = Looker(spec=SPEC, material=samples, score=scored, repeat=None, model=model)
    question = SampleQuestion.of(SPEC, 0)
    whole = question.answer(looker).embeddings
    joined = question.join([share.answer(looker) for share in question.split(shares)]).embeddings
    assert whole is not None
    assert joined is not None
    for name in ("sample", "prefix", "whole"):
        assert getattr(joined, name).tobytes() == getattr(whole, name).tobytes()
    later = SampleQuestion.of(SPEC, 1).answer(looker).embeddings
    assert later is not None
    assert later.prefix is None  # nobody would read it


def test_a_trial_says_how_alike_samples_were_before_it_and_how_many_directions_there_are_at_each_probe() -> None:
    measurements = list(run_trial(SPEC))
    samples = prepare_samples(SPEC)
    native = [index for index, sample in enumerate(samples.known) if sample.role != HELD_OUT]
    base = embed(load_model(SPEC.model, seed=0), samples, every_row(samples))
    assert base.prefix is not None
    prefix, whole = base.prefix[native], base.whole[native]
    first, *later = measurements
    for key, value in (similarity(prefix, whole) | collapse(whole)).items():
        assert first.metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert first.samples is not None
    nearest = first.samples["nearest_full"].to_pylist()
    np.testing.assert_allclose(nearest[:12], nearest_neighbour(whole, centred=True), atol=1e-5)
    assert nearest[12:] == [None] * 4
    ranks = [each.metrics["collapse/effective_rank"] for each in measurements]
    assert len({*ranks}) == len(ranks)  # of the model as it is, not as it was
    for each in later:
        assert not any(key.startswith("similarity/") for key in each.metrics)
        assert each.samples is not None
        assert each.samples[NEAREST[0]].null_count == 16
    again = remeasure_samples(SPEC, samples_table(measurements))
    assert [each.record() for each in again] == [each.record() for each in measurements]


def test_nothing_is_said_of_embeddings_where_nobody_asked() -> None:
    (last,) = run_trial(changed(SPEC, probes__embeddings=None, probes__epochs=()))
    assert last.samples is not None
    assert not {*TOGETHER, *NEAREST} & {*last.samples.column_names}


def test_a_sentence_encoder_compares_texts_in_place_of_the_model(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    encoder = BertModel(config).eval()
    encoder.save_pretrained(tmp_path)
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    samples = prepare_samples(SPEC)
    found = encode(str(tmp_path), samples.known)
    for index, sample in enumerate(samples.known):
        text = f"{sample.text.prefix} {sample.text.reference}"
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = encoder(ids).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(found.whole[index], expected, atol=2e-5)
    spec = changed(SPEC, probes__embeddings__encoder=str(tmp_path), training__epochs=1)
    first, _ = run_trial(spec)
    native = found.of(np.arange(12))
    assert native.prefix is not None
    assert first.metrics["similarity/full"] == pytest.approx(similarity(native.prefix, native.whole)["similarity/full"])


def test_an_encoder_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probes.embeddings.encoder must be a directory"):
        encode(str(tmp_path / "none"), prepare_samples(SPEC).known)
