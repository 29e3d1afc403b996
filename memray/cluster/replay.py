"""Probes that are added to a finished trial: from the weights that it kept, or by training it again.

Either way the trained strings must score as they did, to the last bit; otherwise what is seen now would be said of a
trial that is another one.
"""

from collections.abc import Iterable, Iterator

from memray.cluster.ledger import TrialFolder
from memray.cluster.probing import prepared, score_snapshot
from memray.measurement import TRAINED, Measurement, Measurer, read_scores
from memray.scoring import TokenScores
from memray.spec import TrialSpec
from memray.trial import Looked, has_context


def is_kept(spec: TrialSpec, trained: TrialFolder) -> bool:
    """Whether a finished trial kept the weights of every epoch that its spec's probes look at."""
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
    measurer = Measurer(spec, model.material.known_trained, model.material.known_held_out)
    read = read_scores(trained.tokens(), trained.strings())
    for epoch, scores, _ in read:
        is_last = epoch == read[-1][0]
        looked = Looked(None)
        if is_last or epoch in spec.probes.epochs:
            with_context = has_context(spec, epoch, is_last=is_last)
            looked = score_snapshot(model, epoch, trained.read_weights(paths[epoch]), with_context=with_context)
            assert looked.trained is not None
            _check(spec, epoch, looked.trained, scores)
        yield measurer.measure(epoch, scores, looked.held_out, context=looked.context, is_last=is_last)


def as_trained(spec: TrialSpec, measurements: Iterable[Measurement], trained: TrialFolder) -> Iterator[Measurement]:
    """The measurements of a trial that is trained again, as long as they repeat what it showed the first time.

    Raises:
        ValueError: If they do not.
    """
    before = {epoch: scores for epoch, scores, _ in read_scores(trained.tokens(), trained.strings())}
    epoch = -1
    for measurement in measurements:
        epoch = measurement.epoch
        _check(spec, epoch, measurement.tokens[TRAINED], before.get(epoch))
        yield measurement
    if epoch < max(before):
        _check(spec, epoch + 1, None, before[epoch + 1])


def _check(spec: TrialSpec, epoch: int, now: TokenScores | None, before: TokenScores | None) -> None:
    if now is None or before is None or not now.is_identical_to(before):
        raise ValueError(
            f"a trial that is looked at again must score its strings as it did, to the last bit, but at epoch {epoch} "
            f"of trial {spec.trial_id()} it does not: it was run on another kind of device, or with other versions; "
            "look at it there, or run the study into another --storage"
        )
