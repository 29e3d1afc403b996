"""Probes that are added to a finished trial: from the weights that it kept, or by training it again.

Either way the trained strings must score as they did, to the last bit; otherwise what is seen now would be said of a
trial that is another one.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from memray.cluster.ledger import TrialFolder
from memray.cluster.probing import look_at_snapshot, prepared
from memray.corpus_trial import SampleQuestion, measure_answer, probe_epochs
from memray.looks import EpochQuestion, Looked, has_context
from memray.measurement import TRAINED, Measurement, Measurer, read_scores
from memray.samples import HELD_OUT, Samples
from memray.scoring import TokenScores
from memray.sequence_measurement import KEPT
from memray.spec import TrialSpec


def is_kept(spec: TrialSpec, trained: TrialFolder) -> bool:
    """Whether a finished trial kept the weights of every epoch that its spec's probes look at.

    One with a curriculum never did.
    """
    if spec.curriculum is not None:
        return False
    finished = trained.finished()
    assert finished is not None
    last = int(finished.summary["epochs"])
    wanted = {epoch for epoch in spec.probes.epochs if epoch < last} | {last}
    return wanted <= trained.kept_weights().keys()


def from_kept_weights(spec: TrialSpec, trained: TrialFolder) -> Iterator[Measurement]:
    """The measurements of a finished trial under its spec's probes, without training.

    Raises:
        ValueError: If its weights score other than they did.
    """
    paths = trained.kept_weights()
    model = prepared(spec.model_dump_json())
    if isinstance(model.material, Samples):
        before = _sample_scores(trained.samples())
        for epoch in sorted(probe_epochs(spec)):
            answer = look_at_snapshot(model, SampleQuestion.of(spec, epoch), trained.read_weights(paths[epoch]))
            measured = measure_answer(spec, model.material, epoch, answer)
            _check_repeats(spec, measured, before)
            yield measured
        return
    measurer = Measurer(spec, model.material.known_trained, model.material.known_held_out)
    read = read_scores(trained.tokens(), trained.strings())
    for epoch, scores, _ in read:
        is_last = epoch == read[-1][0]
        looked = Looked(None)
        if is_last or epoch in spec.probes.epochs:
            question = EpochQuestion(epoch, has_context(spec, epoch, is_last=is_last))
            looked = look_at_snapshot(model, question, trained.read_weights(paths[epoch]))
            assert looked.trained is not None
            _check_same(spec, epoch, looked.trained.is_identical_to(scores))
        yield measurer.measure(epoch, scores, looked.held_out, context=looked.context, is_last=is_last)


def as_trained(spec: TrialSpec, measurements: Iterable[Measurement], trained: TrialFolder) -> Iterator[Measurement]:
    """The measurements of a trial that is trained again, as long as they repeat what it showed the first time.

    Raises:
        ValueError: If they do not.
    """
    if spec.corpus is not None:
        seen = _sample_scores(trained.samples())
        for measurement in measurements:
            _check_repeats(spec, measurement, seen)
            yield measurement
        return
    before = _trained_scores(spec, trained)
    epoch = -1
    for measurement in measurements:
        epoch = measurement.epoch
        now = _stage_scores(measurement.matrix) if spec.curriculum else measurement.tokens[TRAINED]
        _check_same(spec, epoch, _is_same(now, before.pop(epoch, None)))
        yield measurement
    _check_same(spec, min(before, default=epoch), not before)


def _trained_scores(spec: TrialSpec, trained: TrialFolder) -> dict[int, TokenScores | bytes]:
    """What the trained strings scored, by epoch; of a curriculum, by the epoch at which each stage ended."""
    if spec.curriculum is None:
        return {epoch: scores for epoch, scores, _ in read_scores(trained.tokens(), trained.strings())}
    matrix = trained.matrix()
    stages = matrix["stage"].to_numpy()
    parts = [matrix.filter(pa.array(stages == stage)) for stage in np.unique(stages)]
    ends = [each["epoch"] for each in trained.measurements()[0]]
    return {epoch: _stage_scores(part) for epoch, part in zip(ends, parts, strict=True)}


def _sample_scores(samples: pa.Table) -> dict[int, bytes]:
    """What the trained samples scored, by epoch."""
    own = samples.filter(pa.array(np.array(samples["role"].to_pylist()) != HELD_OUT))
    epochs = own["epoch"].to_numpy()
    found = {}
    for epoch in np.unique(epochs):
        rows = own.filter(pa.array(epochs == epoch)).combine_chunks()
        scores = (rows[name].combine_chunks().flatten().to_numpy() for name in ("log_prob", "predicted", "rank"))
        found[int(epoch)] = b"".join(each.tobytes() for each in scores)
    return found


def _check_repeats(spec: TrialSpec, measured: Measurement, before: dict[int, bytes]) -> None:
    """Of the probe epochs that it had before, if any: the last one always is among them."""
    assert measured.samples is not None
    if measured.epoch in before:
        now = _sample_scores(measured.samples)
        _check_same(spec, measured.epoch, now[measured.epoch] == before[measured.epoch])


def _stage_scores(matrix: pa.Table | None) -> bytes:
    """What a stage's own strings came to, epoch by epoch."""
    assert matrix is not None
    own = matrix.filter(matrix["is_own"])
    return b"".join(own[key].to_numpy().tobytes() for key in KEPT)


def _is_same(now: TokenScores | bytes, before: TokenScores | bytes | None) -> bool:
    if isinstance(now, TokenScores):
        return isinstance(before, TokenScores) and now.is_identical_to(before)
    return now == before


def _check_same(spec: TrialSpec, epoch: int, is_same: bool) -> None:
    if not is_same:
        raise ValueError(
            f"a trial that is looked at again must score its strings as it did, to the last bit, but at epoch {epoch} "
            f"of trial {spec.trial_id()} it does not: it was run on another kind of device, or with other versions; "
            "look at it there, or run the study into another --storage"
        )
