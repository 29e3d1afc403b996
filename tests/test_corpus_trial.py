"""A trial on a corpus: against a plain Hugging Face loop, against `generate`, across shares and interruptions."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memray.corpus_trial import SampleQuestion
from memray.families import FAMILIES
from memray.finetune import Engine, learning_rate, scoring_passes
from memray.looks import Checkpoint, Looker
from memray.measurement import Measurement, samples_table, string_table, token_table
from memray.measures.match_length import Correctness
from memray.models import load_model, load_tokenizer
from memray.sample_measurement import SampleScores, ScoredSamples, measure_samples, remeasure_samples, sample_table
from memray.samples import HELD_OUT, prepare_samples
from memray.scoring import score
from memray.spec import TrialSpec
from memray.sweep import vary
from memray.trial import ModelShelf, run_trial

SHELF = ModelShelf()


def changed(base: TrialSpec, **changes: Any) -> TrialSpec:
    spec = vary(base, {name.replace("__", "."): value for name, value in changes.items()})
    assert isinstance(spec, TrialSpec), spec
    return spec


SMALL = TrialSpec.model_validate(
    {
        "corpus": {"rows": {"generator": "facts"}, "num_samples": 16},
        "model": {"size": "tiny-text"},
        "training": {"epochs": 6, "strings_per_step": 4, "learning_rate": 3e-3},
        "probes": {"epochs": (0, 1, 4), "num_held_out": 4},
    }
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def measured(spec: TrialSpec, **options: Any) -> list[Measurement]:
    return list(run_trial(spec, shelf=SHELF, **options))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"corpus__targets": "whole"},
        {"training__label_smoothing": 0.1},
        {"training__strings_per_forward": 2},
        {"corpus__copied_share": 0.25, "corpus__copies": 3, "training__strings_per_step": 8},
        {"corpus__samples_per_row": 2},
    ],
    ids=str,
)
def test_a_trial_equals_a_plain_loop_over_hugging_faces_own_loss(changes: dict[str, Any]):
    spec = changed(SMALL, **changes)
    *_, last = measured(spec)
    samples = prepare_samples(spec)
    model = load_model(spec.model, seed=spec.model_seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    batch, step = samples.trained, 0
    for epoch in range(6):
        order = np.random.default_rng(np.random.SeedSequence([0, epoch])).permutation(len(batch.ids))
        for rows in np.split(order, spec.steps_per_epoch):
            own = batch.of(np.sort(rows))
            labels = torch.where(own.is_target, own.ids, -100)
            logits = model(input_ids=own.ids, attention_mask=own.attention_mask).logits[:, :-1]
            smoothing = spec.training.label_smoothing
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), label_smoothing=smoothing
            )
            if not smoothing:
                theirs = model(input_ids=own.ids, attention_mask=own.attention_mask, labels=labels).loss
                assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.param_groups[0]["lr"] = learning_rate(step, 6 * spec.steps_per_epoch, spec.training)
            optimiser.step()
            step += 1
    with torch.no_grad():
        scored = samples.scored
        labels = torch.where(scored.is_target, scored.ids, -100)[:, 1:]
        held_out = torch.tensor([samples.known[index].role == HELD_OUT for index in samples.order])
        logits = model.eval()(input_ids=scored.ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        reference = torch.zeros_like(labels, dtype=torch.bool)
        for row, index in enumerate(samples.order):
            begin = len(samples.known[index].prompt_ids) - 1
            reference[row, begin : begin + len(samples.known[index].reference_ids)] = True
        expected = losses[reference & ~held_out[:, None]].mean().item()
    assert last.metrics["recall/nll_nats"] == pytest.approx(expected, rel=2e-3)


# Match lengths.


def train_to_partial_recall(family: str, targets: str) -> tuple[TrialSpec, torch.nn.Module]:
    """A model that recites some samples, parts of others and nothing of the rest."""
    spec = changed(
        SMALL, model__family=family, corpus__targets=targets, training__epochs=14, training__keep_weights="final",
        probes__epochs=(),
    )  # fmt: skip
    (last,) = measured(spec)
    model = load_model(spec.model, seed=0)
    assert last.weights is not None
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in last.weights.items()})
    return spec, model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_match_length_is_what_generate_gives(family: str):
    """Of every sample; from every prefix of it in one family, from the reference and two others elsewhere."""
    spec, model = train_to_partial_recall(family, "whole")
    samples = prepare_samples(spec)
    scores = SampleScores.of(score(model, samples.scored, samples.alphabet), samples.order)
    (own,) = ScoredSamples.read(sample_table(0, scores, samples.known, with_text=False))
    counts = own.num_before + own.num_reference
    runs = np.split(Correctness(own.is_right, counts).run_lengths(), np.cumsum(counts)[:-1])
    found = set()
    for sample, run in zip(samples.known, runs, strict=True):
        ids = torch.from_numpy(sample.ids)[None]
        reference = len(sample.prompt_ids)
        begins = range(1, ids.shape[1]) if family == "pythia" else (1, reference, ids.shape[1] - 2)
        for begin in begins:
            prompt, rest = ids[:, :begin], ids[0, begin:]
            new = model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(rest), do_sample=False,
                eos_token_id=None, pad_token_id=2,
            )[0, begin:]  # fmt: skip
            wrong = torch.nonzero(new != rest)
            expected = int(wrong[0]) if len(wrong) else len(rest)
            assert run[begin - 1] == expected
            found.add("all" if expected == len(rest) else "some" if expected else "none")
    assert found == {"all", "some", "none"}


def test_metrics_are_those_of_the_match_lengths_of_the_references():
    (*_, last) = measured(SMALL)
    assert last.samples is not None
    rows = last.samples.to_pylist()
    native = [row for row in rows if row["role"] == "native"]
    lengths = []
    for row in native:
        assert len(row["is_right"]) == row["reference_tokens"]
        wrong = [k for k, right in enumerate(row["is_right"]) if not right]
        lengths.append(wrong[0] if wrong else len(row["is_right"]))
    assert last.metrics["match/mean"] == pytest.approx(np.mean(lengths))
    assert last.metrics["match/max"] == max(lengths)
    bits = [right for row in native for right in row["is_right"]]
    assert last.metrics["recall/token_accuracy"] == pytest.approx(np.mean(bits))
    log_probs = [value for row in native for value in row["log_prob"]]
    assert last.metrics["recall/nll_nats"] == pytest.approx(-np.mean(log_probs))
    held_out = [row for row in rows if row["role"] == "held_out"]
    assert last.metrics["recall/heldout_nll_nats"] == pytest.approx(
        -np.mean([value for row in held_out for value in row["log_prob"]])
    )
    assert math.isclose(last.metrics["match/tie_rate"], 0.0)


def test_text_stands_with_the_first_probe_epoch_alone():
    measurements = measured(changed(SMALL, probes__epochs=(1, 4)))
    assert [each.epoch for each in measurements] == [1, 4, 6]
    texts = [each.samples["prefix"].null_count for each in measurements if each.samples is not None]
    assert texts == [0, 20, 20]


def test_a_trial_measured_again_from_its_records_gives_the_same_to_the_last_bit():
    spec = changed(
        SMALL, probes__compared_strings=10, corpus__foreign={"generator": "questions"}, corpus__num_foreign=4
    )
    measurements = measured(spec)
    again = remeasure_samples(spec, samples_table(measurements))
    assert [each.record() for each in again] == [each.record() for each in measurements]
    assert "match/foreign_mean" in measurements[-1].metrics
    alone = measure_samples(changed(spec, probes__compared_strings=0), measurements[-1].samples)
    assert alone.metrics["recall/nll_nats"] != measurements[-1].metrics["recall/nll_nats"]


@pytest.mark.parametrize("shares", [1, 2, 3, 40])
def test_shares_of_a_look_join_to_the_whole_to_the_last_bit(shares: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("memray.finetune.TOKENS_PER_SCORING_PASS", 64)  # so that there are many passes
    samples = prepare_samples(SMALL)
    model = load_model(SMALL.model, seed=0)
    num_passes = len(scoring_passes(samples.scored))
    assert num_passes > 3
    asked = []

    def scored(batch: Any) -> Any:
        parts = [score(model, part, samples.alphabet) for part in scoring_passes(batch)]
        asked.append(len(batch.ids))
        return type(parts[0]).concatenate(parts)

    looker = Looker(spec=SMALL, material=samples, score=scored, repeat=None, model=model)
    whole = SampleQuestion(3).answer(looker).scores
    question = SampleQuestion(3)
    answers = [share.answer(looker) for share in question.split(shares)]
    joined = question.join(answers).scores
    assert whole is not None
    for name in ("sample", *SampleScores.COLUMNS):
        assert getattr(joined, name).tobytes() == getattr(whole, name).tobytes()
    assert sum(asked) == 2 * len(samples.known)  # none twice, none left out
    assert sum(answer.scores is None for answer in answers) == max(0, shares - num_passes)


class Interruption(Exception):  # noqa: N818
    pass


class FileKeeper:
    """Keeps one checkpoint and then stops the trial, or hands it out."""

    def __init__(self, folder: Path, at: int | None, before: list[Measurement]) -> None:
        self.folder, self.at, self.before = folder, at, before

    def newest(self) -> Checkpoint | None:
        if self.at is not None:
            return None
        epoch = int((self.folder / "epoch").read_text())
        return Checkpoint(epoch, self.folder, token_table(self.before), string_table(self.before))

    def is_due(self) -> bool:
        return self.at is not None

    def keep(self, epoch: int, engine: Engine) -> None:
        if epoch == self.at:
            engine.save(self.folder)
            (self.folder / "epoch").write_text(str(epoch))
            raise Interruption


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_trial_continued_from_a_checkpoint_ends_bit_identical(at: int, tmp_path: Path):
    spec = changed(SMALL, model__dropout=0.1)
    undisturbed = measured(spec)
    before: list[Measurement] = []
    with contextlib.suppress(Interruption):
        before.extend(run_trial(spec, shelf=SHELF, keeper=FileKeeper(tmp_path, at, [])))
    assert [each.epoch for each in before] == [epoch for epoch in (0, 1, 4) if epoch < at]
    after = measured(spec, keeper=FileKeeper(tmp_path, None, before))
    assert [each.record() for each in before + after] == [each.record() for each in undisturbed]
    assert sum(each.num_trained for each in before + after) == sum(each.num_trained for each in undisturbed)


def test_a_tiny_model_recites_what_it_was_shown_often_and_not_what_it_never_saw():
    *_, last = measured(changed(SMALL, training__epochs=30, probes__epochs=()))
    assert last.metrics["match/mean"] > 3 * last.metrics["match/heldout_mean"]
    assert last.metrics["match/censored"] > 0.5
    assert load_tokenizer(SMALL.model).vocab_size == 2048


def test_match_lengths_after_given_tokens_are_those_of_a_literal_reading():
    given = (0, 1, 3)
    spec = changed(SMALL, training__epochs=14, probes__epochs=(), probes__prefix_lengths=given)
    (last,) = measured(spec)
    (scored,) = ScoredSamples.read(last.samples)
    correctness, _ = scored.reference(scored.role == "native")
    references = np.split(correctness.is_right, np.cumsum(correctness.length)[:-1])
    long = [each for each in references if len(each) > 3]
    assert last.metrics["prefix/compared"] == len(long) > 0
    for number in given:
        found = []
        for each in long:
            recited = 0
            while recited < len(each) - 3 and each[number + recited]:
                recited += 1
            found.append(recited)
        assert last.metrics[f"prefix/match_{number}"] == pytest.approx(np.mean(found))
        whole = np.mean([recited == len(each) - 3 for each, recited in zip(long, found, strict=True)])
        assert last.metrics[f"prefix/whole_{number}"] == pytest.approx(whole)
    assert 0 < last.metrics["prefix/match_0"] < np.mean([len(each) - 3 for each in long])
