"""One trial: the same bits wherever it ran, every epoch once, and all measures again from its records."""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pytest
import torch

from memray.finetune import as_tensor
from memray.measurement import Measurement, read_scores, remeasure, string_table, token_table
from memray.models import load_model
from memray.scoring import AlphabetIds, score
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StopWhen, StringsSpec, TrainingSpec, TrialSpec
from memray.strings import ALPHABETS
from memray.sweep import vary
from memray.trial import ModelShelf, known_strings, prepare, run_trial

SHORT = TrialSpec(strings=StringsSpec(length=48, alphabet_size=7), training=TrainingSpec(epochs=12))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def changed(changes: Mapping[str, object], base: TrialSpec = SHORT) -> TrialSpec:
    spec = vary(base, changes)
    assert isinstance(spec, TrialSpec), spec
    return spec


def records(measurements: list[Measurement]) -> list[dict]:
    return [each.record() for each in measurements]


def test_every_epoch_is_measured_once_and_probe_epochs_hold_the_held_out_strings() -> None:
    measured = list(run_trial(changed({"probes.epochs": (0, 2, 5)})))
    assert [each.epoch for each in measured] == list(range(13))
    assert [each.epoch for each in measured if "guessing/heldout_accuracy" in each.metrics] == [0, 2, 5, 12]
    assert [each.epoch for each in measured if "phase/memorisation" in each.metrics] in ([], [12])
    assert all("recall/robust" in each.metrics for each in measured)
    assert all(math.isfinite(value) for each in measured for value in each.metrics.values())


def test_a_trial_repeats_to_the_bit_whatever_the_process_ran_before() -> None:
    shelf = ModelShelf()
    alone = records(list(run_trial(SHORT)))
    torch.manual_seed(99)
    for other in ({"model.family": "gpt2"}, {"model_seed": 5}, {"compute.precision": "bf16"}, {}):
        list(run_trial(changed(other), shelf=shelf))
    assert records(list(run_trial(SHORT, shelf=shelf))) == alone
    assert records(list(run_trial(SHORT, shelf=shelf))) == alone


def test_seeds_decide_string_and_weights() -> None:
    first = records(list(run_trial(SHORT)))
    assert records(list(run_trial(changed({"string_seed": 1})))) != first
    assert records(list(run_trial(changed({"model_seed": 1})))) != first


def test_measures_of_the_records_are_those_of_the_trial_to_the_bit() -> None:
    spec = changed({"strings.num_strings": 3, "strings.entropy_bits": 1.5, "training.strings_per_step": 3})
    measured = list(run_trial(spec))
    # As the ledger holds them: two segments each.
    tokens = pa.concat_tables([token_table(measured[:5]), token_table(measured[5:])])
    strings = pa.concat_tables([string_table(measured[:5]), string_table(measured[5:])], promote_options="default")
    symbol_ids = prepare(spec).symbol_ids
    _, known = known_strings(spec, symbol_ids, "trained")
    _, known_held_out = known_strings(spec, symbol_ids, "held_out")
    again = remeasure(spec, known, known_held_out, tokens, strings)
    assert records(again) == records(measured)
    assert repr([each.strings for each in again]) == repr([each.strings for each in measured])  # nan equals nan here
    assert [epoch for epoch, _, _ in read_scores(tokens, strings)] == list(range(13))


def test_records_hold_every_target_of_every_string_and_epoch() -> None:
    measured = list(run_trial(changed({"strings.num_strings": 2, "probes.num_held_out": 3, "probes.epochs": (0,)})))
    tokens = token_table(measured).to_pandas()
    trained = tokens[~tokens.is_held_out]
    assert len(trained) == 13 * 2 * 47
    assert sorted(tokens[tokens.is_held_out].epoch.unique()) == [0, 12]
    assert (trained.groupby(["epoch", "string"]).position.apply(list).map(lambda p: p == list(range(1, 48)))).all()
    strings = string_table(measured).to_pandas()
    assert set(strings[strings.role == "trained"].text.str.len()) == {48}
    assert set("".join(strings.text)) <= set("abcdefg")


def test_with_bos_the_first_symbol_is_scored_too() -> None:
    (first, *_) = run_trial(changed({"model.bos": True, "probes.num_held_out": 0}))
    assert first.tokens["trained"].position.tolist() == list(range(48))


def test_a_criterion_ends_the_trial_with_its_phases_and_held_out_strings() -> None:
    rule = StopWhen(metric="recall/token_accuracy", at_least=0.2, epochs=2)
    measured = list(run_trial(changed({"training.stop_when": rule.model_dump(), "probes.epochs": (0,)})))
    met = [each.metrics["recall/token_accuracy"] >= 0.2 for each in measured]
    assert 0 < measured[-1].epoch < 12
    assert met[-2:] == [True, True]
    assert not any(a and b for a, b in itertools.pairwise(met[:-1]))
    assert "guessing/heldout_accuracy" in measured[-1].metrics
    undisturbed = list(run_trial(changed({"probes.epochs": (0,)})))
    assert measured[-2].metrics == undisturbed[measured[-2].epoch].metrics


@pytest.mark.parametrize("keep", ["final", "probe_epochs"])
def test_kept_weights_give_the_scores_of_their_epoch_again(keep: str) -> None:
    spec = changed({"training.keep_weights": keep, "probes.epochs": (0, 3)})
    measured = list(run_trial(spec))
    kept = [each for each in measured if each.weights is not None]
    assert [each.epoch for each in kept] == ([12] if keep == "final" else [0, 3, 12])
    material = prepare(spec)
    alphabet = AlphabetIds(torch.as_tensor(material.symbol_ids), torch.full((7,), 1 / 7))
    for each in kept:
        assert each.weights is not None
        model = load_model(spec.model, seed=7)
        state = {name: as_tensor(array, torch.float32) for name, array in each.weights.items()}
        model.load_state_dict(state)
        scores = score(model, material.trained, alphabet)
        assert scores.log_prob == pytest.approx(each.tokens["trained"].log_prob, abs=1e-5)


def test_compared_strings_are_those_that_the_trial_reports() -> None:
    spec = changed({"strings.num_strings": 4})
    on_all = list(run_trial(spec))
    on_one = list(run_trial(changed({"strings.num_strings": 4, "probes.compared_strings": 1})))
    assert on_one[3].strings == on_all[3].strings
    assert on_one[3].metrics["recall/nll_nats"] == on_all[3].strings[0]["recall/nll_nats"]
    mean = np.mean([row["recall/nll_nats"] for row in on_all[3].strings if row["role"] == "trained"])
    assert on_all[3].metrics["recall/nll_nats"] == pytest.approx(mean)


@pytest.mark.parametrize("alphabet", [*ALPHABETS, "vocabulary"])
def test_every_alphabet_can_be_memorised_with_every_family(alphabet: str) -> None:
    for family in ("pythia", "llama2"):
        spec = changed({"strings.alphabet": alphabet, "model.family": family, "training.epochs": 1})
        assert len(list(run_trial(spec))) == 2


def test_an_untrained_tiny_model_guesses_and_then_recalls() -> None:
    spec = TrialSpec(strings=StringsSpec(length=64), training=TrainingSpec(epochs=60))
    measured = list(run_trial(spec))
    assert measured[0].metrics["recall/token_accuracy"] < 0.1
    assert measured[0].metrics["recall/robust"] < 0.05
    assert measured[-1].metrics["recall/robust"] > 0.7
    assert measured[-1].metrics["guessing/heldout_accuracy"] < 0.2
    assert 0 < measured[-1].metrics["phase/epochs_to_robust_50"] < 60


def test_an_accelerator_that_is_not_there_is_an_error_and_no_fall_back() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    spec = SHORT.model_copy(update={"compute": ComputeSpec(accelerator="h200")})
    with pytest.raises(ValueError, match="needs a CUDA device, but this machine has none"):
        run_trial(spec)


def test_a_directory_of_save_pretrained_trains_like_the_model_it_was_saved_from(tmp_path) -> None:
    from memray.models import load_tokenizer

    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path)
    load_tokenizer(ModelSpec()).save_pretrained(tmp_path)
    built_in = [each.metrics for each in run_trial(SHORT)]
    changes = {"model.path": str(tmp_path), "training.learning_rate": 1e-3, "training.epochs": 12}
    assert [each.metrics for each in run_trial(changed(changes | {"model.pretrained": True}))] == built_in
    assert [each.metrics for each in run_trial(changed(changes))] == built_in


def test_probes_are_no_part_of_what_is_trained() -> None:
    other = changed({"probes": ProbesSpec(epochs=(1, 4), num_held_out=2).model_dump()})
    assert other.trial_id() == SHORT.trial_id()
    for ours, theirs in zip(run_trial(SHORT), run_trial(other), strict=True):
        assert ours.metrics["recall/nll_nats"] == theirs.metrics["recall/nll_nats"]
