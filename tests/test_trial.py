"""One trial: the same bits wherever it ran, every epoch once, and all measures again from its records."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from memray.encoding import Batch
from memray.finetune import Engine, as_tensor
from memray.measurement import Measurement, read_scores, remeasure, string_table, token_table
from memray.models import load_model
from memray.scoring import AlphabetIds, TokenScores, score
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StopWhen, StringsSpec, TrainingSpec, TrialSpec
from memray.strings import ALPHABETS
from memray.sweep import vary
from memray.trial import (
    Checkpoint,
    Look,
    Looked,
    ModelShelf,
    Ready,
    forwards_of_epoch,
    known_strings,
    prepare,
    run_trial,
)

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


class FolderKeeper:
    """Keeps one checkpoint, and what was measured before it, and leaves the trial in the middle of it."""

    def __init__(self, folder: Path, leave_at: int | None = None) -> None:
        self.folder = folder
        self.leave_at = leave_at
        self.checkpoint: Checkpoint | None = None
        self.measured: list[Measurement] = []

    def newest(self) -> Checkpoint | None:
        return self.checkpoint

    def is_due(self) -> bool:
        return self.leave_at is not None

    def keep(self, epoch: int, engine: Engine) -> None:
        if epoch == self.leave_at:
            engine.save(self.folder)
            self.checkpoint = Checkpoint(epoch, self.folder, token_table(self.measured), string_table(self.measured))
            raise KeyboardInterrupt

    def run(self, spec: TrialSpec) -> list[Measurement]:
        self.measured = []
        with contextlib.suppress(KeyboardInterrupt):
            for each in run_trial(spec, keeper=self):
                self.measured.append(each)
        return self.measured


@pytest.mark.parametrize(
    ("leave_at", "changes"),
    [
        (1, {}),
        (6, {"strings.num_strings": 4, "training.strings_per_step": 2, "model.dropout": 0.1}),
        (6, {"training.stop_when": {"at_least": 0.05, "epochs": 7}, "training.optimiser": "sgd"}),
        (2, {"compute.precision": "bf16", "model.lora": {"rank": 2}, "training.epochs": 4}),
    ],
    ids=["plain", "dropout and several steps", "stopped by a criterion", "bf16, LoRA"],
)
def test_a_resumed_trial_ends_bit_identical(tmp_path: Path, leave_at: int, changes: dict[str, Any]) -> None:
    spec = changed(changes)
    undisturbed, keeper = list(run_trial(spec)), FolderKeeper(tmp_path, leave_at)
    before = keeper.run(spec)
    keeper.leave_at = None
    after = keeper.run(spec)
    assert [each.epoch for each in before] == list(range(leave_at))
    assert [each.record() for each in before + after] == [each.record() for each in undisturbed]
    assert string_table(before + after).equals(string_table(undisturbed))
    for ours, theirs in zip(before + after, undisturbed, strict=True):
        assert all(ours.tokens[role].is_identical_to(scores) for role, scores in theirs.tokens.items())


class LateProber:
    """Looks whose results come only when they are asked for, as from an actor that is slower than training."""

    def __init__(self, held_out: Batch) -> None:
        self.held_out = held_out
        self.waited_for: list[int] = []

    def look(self, epoch: int, engine: Engine) -> Look:
        prober, scores = self, engine.score(self.held_out)

        class Late:
            def is_ready(self) -> bool:
                return False

            def result(self) -> Looked:
                prober.waited_for.append(epoch)
                return Looked(scores)

        return Late()


def test_measurements_wait_for_their_looks_and_stay_in_order() -> None:
    held_out = prepare(SHORT).held_out
    assert held_out is not None
    prober = LateProber(held_out)
    late = list(run_trial(SHORT, prober=prober))
    assert [each.record() for each in late] == [each.record() for each in run_trial(SHORT)]
    assert prober.waited_for == sorted(prober.waited_for)


@pytest.mark.parametrize("changes", [{}, {"training.strings_per_step": 2}, {"model.dropout": 0.1}])
def test_a_stopped_trial_has_its_end_however_its_epochs_are_scored(changes: dict[str, Any]) -> None:
    rule = {"at_least": 0.05, "epochs": 2}
    stopped = {"strings.num_strings": 4, "training.strings_per_step": 0, "training.stop_when": rule}
    spec = changed(stopped | {"training.keep_weights": "final", "probes.epochs": (0,)} | changes)
    held_out = prepare(spec).held_out
    assert held_out is not None
    for prober in (None, LateProber(held_out)):
        measured = list(run_trial(spec, prober=prober))
        assert 0 < measured[-1].epoch < 12
        assert [each.epoch for each in measured] == list(range(len(measured)))
        assert "guessing/heldout_accuracy" in measured[-1].metrics
        assert "phase/memorisation" in measured[-1].strings[0]
        assert measured[-1].weights is not None


def test_a_look_that_scores_the_trained_strings_otherwise_ends_the_trial() -> None:
    material = prepare(SHORT)
    assert material.held_out is not None

    class Wrong(LateProber):
        def look(self, epoch: int, engine: Engine) -> Look:
            scores = engine.score(material.trained)
            return Ready(Looked(None, replace(scores, log_prob=scores.log_prob + np.float32(1e-6))))

    with pytest.raises(RuntimeError, match="must equal the trainer's to the last bit, but at epoch 0"):
        list(run_trial(SHORT, prober=Wrong(material.held_out)))


def test_the_batches_of_an_epoch_give_the_trainers_scores_again_bit_for_bit() -> None:
    for changes in ({}, {"strings.num_strings": 4, "training.strings_per_step": 0, "training.strings_per_forward": 2}):
        spec = changed({"training.keep_weights": "probe_epochs", "probes.epochs": (0, 3)} | changes)
        material = prepare(spec)
        alphabet = AlphabetIds(torch.as_tensor(material.symbol_ids), torch.full((7,), 1 / 7))
        for each in run_trial(spec):
            if each.weights is not None:
                model = load_model(spec.model, seed=7).eval()
                model.load_state_dict({name: as_tensor(array, torch.float32) for name, array in each.weights.items()})
                forwards = forwards_of_epoch(spec, material.trained, each.epoch)
                scores = TokenScores.concatenate([score(model, part, alphabet) for part in forwards])
                assert scores.is_identical_to(each.tokens["trained"]), each.epoch


def test_a_trial_of_many_devices_is_refused_in_one_process() -> None:
    with pytest.raises(ValueError, match=r"one process runs trials of engine 'torch', but trial .* `run` starts them"):
        list(run_trial(changed({"compute.engine": "deepspeed"})))
