"""Embeddings of samples: against Hugging Face's own hidden states, across shares, and from records again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from memray.corpus_trial import SampleQuestion
from memray.embedding import NEAREST, TOGETHER, check_encoder, embed, encode, is_on_hub
from memray.finetune import lower_weights, scoring_passes
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


def test_embeddings_see_the_adapters_as_weights_that_they_are_added_to() -> None:
    spec = changed(SPEC, model__lora={"rank": 4, "alpha": 8.0})
    samples, adapted = prepare_samples(spec), load_model(spec.model, seed=0)
    plain = load_model(SPEC.model, seed=0)
    weights = dict(plain.named_parameters())
    torch.manual_seed(0)
    num_adapted = 0
    with torch.no_grad():
        for name, layer in adapted.named_modules():
            if hasattr(layer, "lora_B"):
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight  # type: ignore[union-attr]
                up.normal_(std=0.1)  # zero before training, so that nothing would be seen
                weights[f"{name}.weight"] += 8.0 / 4 * up @ down
                num_adapted += 1
    assert num_adapted == 4
    found = embed(adapted, samples, every_row(samples))
    for index, sample in enumerate(samples.known):
        with torch.no_grad():
            states = plain(torch.from_numpy(sample.ids)[None], output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(found.whole[index], states.mean(0).numpy(), atol=2e-5)
    unadapted = embed(load_model(spec.model, seed=0), samples, every_row(samples))
    assert np.abs(unadapted.whole - found.whole).max() > 0.01


def test_embeddings_of_a_model_at_bf16_are_means_at_fp32_of_its_hidden_states() -> None:
    samples, model = prepare_samples(SPEC), load_model(SPEC.model, seed=0)
    lower_weights(model)
    theirs = load_model(SPEC.model, seed=0, dtype=torch.bfloat16)
    found = embed(model, samples, every_row(samples))

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states = theirs(ids, output_hidden_states=True).hidden_states[-1]
        assert states.dtype == torch.bfloat16
        return states.float()

    together = hidden(samples.scored.ids)
    for row, index in enumerate(samples.order):
        ids = samples.known[index].ids
        np.testing.assert_allclose(found.whole[index], together[row, : len(ids)].mean(0).numpy(), atol=1e-6)
        # Alone, its states are rounded otherwise: by 2^-8 of their size, which is about 1.
        alone = hidden(torch.from_numpy(ids)[None])[0].mean(0).numpy()
        np.testing.assert_allclose(found.whole[index], alone, atol=2**-8)


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


# Sentence encoders.


def save_encoder(folder: Path) -> BertModel:
    """A random encoder with its tokenizer, as save_pretrained writes them."""
    config = BertConfig(vocab_size=2048, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=128)  # fmt: skip
    torch.manual_seed(0)
    encoder = BertModel(config).eval()
    encoder.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return encoder


def test_a_sentence_encoder_compares_texts_in_place_of_the_model(tmp_path: Path) -> None:
    encoder, tokenizer = save_encoder(tmp_path), text_tokenizer()
    check_encoder(str(tmp_path))
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


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("*", "has no model.safetensors"),
        ("model.safetensors", "has no model.safetensors"),
        ("config.json", r"cannot be read: .*config.json"),
        ("tokenizer*", "has no tokenizer"),
    ],
)
def test_an_encoder_of_which_a_part_is_missing_is_refused_before_it_is_loaded(
    missing: str, sentence: str, tmp_path: Path
) -> None:
    save_encoder(tmp_path)
    for path in tmp_path.glob(missing):
        path.unlink()
    with pytest.raises(ValueError, match=rf"probes.embeddings.encoder must be a directory .* {sentence}"):
        check_encoder(str(tmp_path))


@pytest.mark.parametrize("where", ["{}/none", "./none", "{}/" + "long" * 99, "a/b/c"])
def test_a_path_that_is_no_directory_is_no_encoder_of_the_hub(where: str, tmp_path: Path) -> None:
    where = where.format(tmp_path)
    assert not is_on_hub(where)
    with pytest.raises(ValueError, match=r"'.*' is no directory; mend it"):
        check_encoder(where)


def test_a_directory_is_named_as_every_worker_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'encoder' is no absolute path, and the workers"):
        check_encoder("encoder")


def test_an_encoder_without_some_of_its_weights_is_refused_and_not_filled_with_random_ones(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without_pooler = {name: weight for name, weight in weights.items() if not name.startswith("pooler")}
    assert len(without_pooler) < len(weights)
    save_file(without_pooler, tmp_path / "model.safetensors", metadata={"format": "pt"})
    known = prepare_samples(SPEC).known
    encode(str(tmp_path), known)
    del without_pooler["embeddings.word_embeddings.weight"]
    save_file(without_pooler, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights, which would be random: embeddings.word_embeddings.weight"):
        encode(str(tmp_path), known)
