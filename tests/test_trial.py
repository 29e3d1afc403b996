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
from memray.looks import Checkpoint, Look, Looked, Question, Ready, forwards_of_epoch
from memray.material import known_strings, prepare, source_of
from memray.measurement import Measurement, context_table, read_scores, remeasure, string_table, token_table
from memray.measures.order import acquisition_epochs, positional_order
from memray.measures.prefix import FULL
from memray.models import load_model, load_tokenizer
from memray.probes import ContextSpec
from memray.scoring import AlphabetIds, TokenScores, score
from memray.spec import ComputeSpec, ModelSpec, ProbesSpec, StopWhen, StringsSpec, TrainingSpec, TrialSpec
from memray.strings import ALPHABETS, TextSource
from memray.sweep import vary
from memray.trial import ModelShelf, run_trial

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
    for key in ("older/counterfactual", "older/exposure_bits"):
        assert [each.epoch for each in measured if key in each.metrics] in ([], [0, 2, 5, 12]), key
    for key in ("older/contextual", "older/longest_run_tokens", "older/windows_right_32"):
        assert all(key in each.metrics for each in measured), key
    assert not any("older/windows_right_50" in each.metrics for each in measured), "47 targets have no such window"
    assert [each.epoch for each in measured if "phase/memorisation" in each.metrics] in ([], [12])
    assert {each.epoch for each in measured for key in each.metrics if key.startswith("order/")} <= {12}
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


def test_a_trial_logs_the_entropy_rate_of_its_source() -> None:
    text = {"strings.kind": "text", "strings.path": __file__, "strings.alphabet_size": 26}
    repeated = {"strings.kind": "repeated", "strings.motif_length": 16}
    for source, bits in (({}, math.log2(7)), (repeated, 16 * math.log2(7) / 48), (text, None)):
        first = next(iter(run_trial(changed(source))))
        assert first.metrics.get("string/entropy_rate_bits") == (bits and pytest.approx(bits))
        assert "guessing/kl_bits" in first.metrics


def test_markov_strings_of_one_trial_share_transitions_that_move_with_the_replicate() -> None:
    markov = {"strings.kind": "markov", "strings.conditional_entropy_bits": 1e-6, "strings.num_strings": 2}
    successors = []
    for string_seed in (0, 1):
        material = prepare(changed(markov | {"string_seed": string_seed}))
        texts = [known.text for known in material.known_trained + material.known_held_out]
        pairs = {pair for text in texts for pair in itertools.pairwise(text)}
        assert len(pairs) == 7, "each symbol has one successor, in all strings of the trial"
        successors.append(pairs)
    assert successors[0] != successors[1]


def test_the_strings_of_a_text_are_passages_of_it(tmp_path: Path) -> None:
    words = "".join(ALPHABETS["latin"][k] for k in np.random.default_rng(0).integers(26, size=600))
    (tmp_path / "text").write_text(" ".join(words))  # the tokenizer does not know spaces
    text = {"strings.kind": "text", "strings.path": str(tmp_path / "text"), "strings.alphabet_size": 26}
    material = prepare(changed(text | {"strings.num_strings": 2, "training.strings_per_step": 2}))
    strings = [known.text.replace(" ", "") for known in material.known_trained + material.known_held_out]
    places = sorted(words.index(string) for string in strings)
    assert all(later - earlier >= 48 for earlier, later in itertools.pairwise(places))
    tokenizer = load_tokenizer(SHORT.model)
    assert tokenizer.batch_decode(material.trained.ids) == strings[:2]
    fewer = prepare(changed(text | {"probes.num_held_out": 1}))
    assert fewer.known_trained[0].text == material.known_trained[0].text
    assert fewer.known_held_out[0].text == material.known_held_out[0].text
    assert fewer.symbol_ids.tolist() == material.symbol_ids.tolist(), (
        "what is looked at decides nothing that is trained"
    )
    assert isinstance(material.source, TextSource)
    assert material.source.num_left_out == 599


def test_a_text_too_short_for_the_trained_and_the_held_out_strings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ab c" * 100)
    spec = changed({"strings.kind": "text", "strings.path": str(tmp_path / "text"), "strings.alphabet_size": 26})
    with pytest.raises(ValueError, match=r"at least 528 tokens, 48 for each of 11 .* it has 300 .* \(and 100 special"):
        prepare(spec)
    assert len(prepare(changed({"probes.num_held_out": 5}, spec)).known_held_out) == 5


def test_seeds_decide_string_and_weights() -> None:
    first = records(list(run_trial(SHORT)))
    assert records(list(run_trial(changed({"string_seed": 1})))) != first
    assert records(list(run_trial(changed({"model_seed": 1})))) != first


@pytest.mark.parametrize(
    "source",
    [
        {"strings.entropy_bits": 1.5},
        {"strings.kind": "markov", "strings.order": 2, "strings.conditional_entropy_bits": 1.0},
        {"strings.kind": "repeated", "strings.motif_length": 12},
        {"strings.kind": "hierarchical", "strings.motif_length": 4, "strings.branching": 3},
        {"strings.kind": "text", "strings.path": __file__, "strings.alphabet_size": 26},
    ],
    ids=lambda source: source.get("strings.kind", "iid"),
)
def test_measures_of_the_records_are_those_of_the_trial_to_the_bit(source: dict[str, Any]) -> None:
    spec = changed({"strings.num_strings": 3, "training.strings_per_step": 3} | source)
    measured = list(run_trial(spec))
    # As the ledger holds them: two segments each.
    tokens = pa.concat_tables([token_table(measured[:5]), token_table(measured[5:])])
    strings = pa.concat_tables([string_table(measured[:5]), string_table(measured[5:])], promote_options="default")
    symbol_ids = prepare(spec).symbol_ids
    _, known = known_strings(spec, source_of(spec), symbol_ids, "trained")
    _, known_held_out = known_strings(spec, source_of(spec), symbol_ids, "held_out")
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
    assert repr(on_one[3].strings) == repr(on_all[3].strings)  # nan equals nan here
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
    assert measured[-1].metrics["older/exposure_bits"] > 10 * measured[0].metrics["older/exposure_bits"]
    assert_order_of_records(spec, measured)


def assert_order_of_records(spec: TrialSpec, measured: list[Measurement]) -> None:
    """The order that a trial logs is the one that its token table gives."""
    (string,) = prepare(spec).known_trained
    tokens = token_table(measured).to_pandas()
    log_prob = tokens[~tokens.is_held_out].pivot(index="epoch", columns="position", values="log_prob")
    acquired = acquisition_epochs(log_prob.to_numpy(), log_prob.index.to_numpy(), string.truth.guesser)
    metrics, order = measured[-1].metrics, positional_order(acquired, rng=np.random.default_rng(0))
    assert metrics["order/spearman"] == order.spearman.value
    assert metrics["order/kendall"] == order.kendall.value
    assert metrics["order/acquired_share"] == np.mean(~np.isnan(acquired)) > 0.5
    assert metrics["order/spearman_p"] == pytest.approx(order.spearman.p_value, abs=0.07), "other permutations"
    assert 0 < metrics["order/runs_p"] <= 1


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

    def look(self, question: Question, engine: Engine) -> Look:
        prober, scores = self, engine.score(self.held_out)

        class Late:
            def is_ready(self) -> bool:
                return False

            def result(self) -> Looked:
                prober.waited_for.append(question.epoch)
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
        def look(self, question: Question, engine: Engine) -> Look:
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


CONTEXT = ContextSpec(epochs=(1,), lengths=(0, 2), replacements=("source", "none"), redraws=2, extractable=(4,))


def test_the_context_is_probed_at_the_chosen_epochs_and_at_the_last() -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=12, alphabet_size=3),
        training=TrainingSpec(epochs=3),
        probes=ProbesSpec(epochs=(0, 1), num_held_out=2, context=CONTEXT),
    )
    measurements = list(run_trial(spec))
    for key in ("context/local_2_source", "context/local_full_source", "context_heldout/local_2_none", "extractable/4"):
        assert [each.epoch for each in measurements if key in each.metrics] == [1, 3], key
    full = measurements[-1].context["trained"].of(None)
    last = measurements[-1].tokens["trained"]
    np.testing.assert_allclose(full.log_prob, last.log_prob, atol=1e-5)
    assert np.array_equal(full.is_right, last.argmax == full_ids(spec))


def full_ids(spec: TrialSpec) -> np.ndarray:
    return prepare(spec).known_trained[0].truth.target_ids


def test_the_epoch_at_which_training_is_stopped_has_the_context_too() -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=12, alphabet_size=3),
        training=TrainingSpec(epochs=30, stop_when=StopWhen(metric="recall/token_accuracy", at_least=0.0, epochs=3)),
        probes=ProbesSpec(epochs=(0, 1, 2), num_held_out=1, context=CONTEXT),
    )
    measurements = list(run_trial(spec))
    assert [each.epoch for each in measurements if each.context] == [1, 2]
    assert measurements[-1].epoch == 2


def test_what_the_context_probe_showed_is_read_back_and_measured_again() -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=12, alphabet_size=3, num_strings=2),
        training=TrainingSpec(epochs=2),
        probes=ProbesSpec(epochs=(0, 1), num_held_out=2, context=CONTEXT),
    )
    measurements, material = list(run_trial(spec)), prepare(spec)
    context = context_table(measurements)
    again = remeasure(
        spec,
        material.known_trained,
        material.known_held_out,
        token_table(measurements),
        string_table(measurements),
        context,
    )
    assert [each.record() for each in again] == [each.record() for each in measurements]
    assert context_table(again) == context


def test_what_is_compared_does_not_decide_when_training_stops_and_bounds_what_the_context_probe_says() -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=12, alphabet_size=3, num_strings=3),
        training=TrainingSpec(
            epochs=150, strings_per_step=0, learning_rate=5e-3, stop_when=StopWhen(at_least=0.8, epochs=1)
        ),
        probes=ProbesSpec(epochs=(0, 1), num_held_out=1, context=CONTEXT),
    )
    one = spec.model_copy(update={"probes": spec.probes.model_copy(update={"compared_strings": 1})})
    all_of_them, first = list(run_trial(spec)), list(run_trial(one))
    assert all_of_them[-1].epoch == first[-1].epoch < 150
    rows = [row for row in first[-1].strings if row["role"] == "trained"]
    assert len(rows) == 3
    assert first[-1].metrics["extractable/4"] == rows[0]["extractable/4"]
    own = first[-1].context["trained"]
    assert (
        first[-1].metrics["context/local_full_source"]
        == own.is_right[(own.string == 0) & (own.k == FULL) & (own.position >= 2)].mean()
    )
