"""Pre-training on fresh random strings, and training with some blocks frozen."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from memray.encoding import ordinary_ids
from memray.families import FAMILIES
from memray.models import freeze, load_model, load_tokenizer
from memray.pretraining import pretrain_in_context, random_strings
from memray.spec import InContextSpec, LoraSpec, ModelSpec, ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.trial import ModelShelf, run_trial

CPU = torch.device("cpu")


def strings_of(spec: InContextSpec, seed: int = 0) -> np.ndarray:
    return np.stack(list(random_strings(spec, num_tokens=50, seed=seed)))


def test_fewer_steps_are_a_beginning_of_more_and_every_string_is_fresh() -> None:
    few, many = strings_of(InContextSpec(steps=2)), strings_of(InContextSpec(steps=5))
    assert few.shape == (2, 8, 64)
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many.reshape(-1, 64), axis=0)) == 40
    assert not np.array_equal(few, strings_of(InContextSpec(steps=2), seed=1))


def test_alphabets_have_every_size_up_to_the_largest() -> None:
    strings = strings_of(InContextSpec(steps=40, length=400, max_alphabet_size=4))
    sizes = [len(np.unique(string)) for string in strings.reshape(-1, 400)]
    assert {2, 3, 4} <= set(sizes) <= {1, 2, 3, 4}  # a rare symbol may be missing
    assert strings.max() < 50


def test_more_symbols_than_the_model_has_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most the 50 ordinary tokens of the model, but is 60; lower it"):
        strings_of(InContextSpec(steps=1, max_alphabet_size=60))


def test_it_is_what_a_plain_loop_over_hugging_faces_loss_does() -> None:
    spec = ModelSpec(in_context=InContextSpec(steps=4, length=32))
    ours = load_model(spec, seed=3)
    pretrain_in_context(ours, spec, seed=3, device=CPU)

    theirs = load_model(spec, seed=3).train()
    tokens = np.random.default_rng(0).permutation(ordinary_ids(load_tokenizer(spec)))
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for strings in random_strings(spec.in_context, num_tokens=len(tokens), seed=3):
        ids = torch.as_tensor(tokens[strings])
        theirs(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    for name, weight in ours.named_parameters():
        if name.endswith("query_key_value.bias"):
            continue  # of the keys' biases the gradient is 0 up to rounding, which AdamW makes a whole step of
        torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=0, atol=1e-5, msg=name)


def test_it_teaches_a_model_to_infer_an_alphabet_in_context() -> None:
    def untaught(steps: int) -> TrialSpec:
        return TrialSpec(
            strings=StringsSpec(length=64, alphabet_size=2),
            model=ModelSpec(in_context=InContextSpec(steps=steps)),
            training=TrainingSpec(epochs=1),
            probes=ProbesSpec(epochs=(0,), num_held_out=10),
        )

    before, after = (next(iter(run_trial(untaught(steps)))).metrics for steps in (0, 100))
    assert after["guessing/heldout_nll_nats"] < before["guessing/heldout_nll_nats"] - 0.7


def test_a_shelf_gives_a_trial_the_same_pretrained_weights_again() -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=16),
        model=ModelSpec(in_context=InContextSpec(steps=2)),
        training=TrainingSpec(epochs=2),
        probes=ProbesSpec(num_held_out=1),
    )
    shelf = ModelShelf()
    first = [each.record() for each in run_trial(spec, shelf=shelf)]
    assert [each.record() for each in run_trial(spec, shelf=shelf)] == first
    assert [each.record() for each in run_trial(spec)] == first


def test_without_steps_nothing_else_may_be_said_of_it() -> None:
    with pytest.raises(ValueError, match=r"in_context.length must be left out where in_context.steps is 0"):
        ModelSpec(in_context=InContextSpec(length=32))
    with pytest.raises(ValueError, match=r"pre-trains without dropout, but got dropout=0.1"):
        ModelSpec(in_context=InContextSpec(steps=1), dropout=0.1)
    with pytest.raises(ValueError, match="only one can be set, but both are"):
        ModelSpec(in_context=InContextSpec(steps=1), lora=LoraSpec())


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_blocks_keep_their_weights_and_all_others_move(family: str) -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=16),
        model=ModelSpec(family=family),
        training=TrainingSpec(epochs=2, learning_rate=1e-2, frozen_blocks=(0, 2)),
        probes=ProbesSpec(num_held_out=0),
    )
    shelf = ModelShelf()
    for _ in run_trial(spec, shelf=shelf):
        pass
    assert shelf._model is not None
    base = dict(load_model(spec.model, seed=0).named_parameters())
    moved = {name: not torch.equal(weight, base[name]) for name, weight in shelf._model.named_parameters()}
    in_blocks = {name: int(name.split(".")[name.split(".").index(stack) + 1]) for name in moved
                 for stack in ("layers", "h") if stack in name.split(".")}  # fmt: skip
    assert len(set(in_blocks.values())) == 4
    for name, number in in_blocks.items():
        # A bias of the keys moves no softmax, so that its gradient is 0 up to rounding.
        assert moved[name] == (number not in (0, 2)) or "k_proj.bias" in name, name
    assert any(moved[name] for name in moved if name not in in_blocks)


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if not each.ties_embeddings])
def test_frozen_embeddings_keep_their_weights_and_all_others_move(family: str) -> None:
    spec = TrialSpec(
        strings=StringsSpec(length=16),
        model=ModelSpec(family=family),
        training=TrainingSpec(epochs=2, learning_rate=1e-2, frozen_embeddings=True),
        probes=ProbesSpec(num_held_out=0),
    )
    shelf = ModelShelf()
    for _ in run_trial(spec, shelf=shelf):
        pass
    assert shelf._model is not None
    base = dict(load_model(spec.model, seed=0).named_parameters())
    kept = {name for name, weight in shelf._model.named_parameters() if torch.equal(weight, base[name])}
    assert [name for name in kept if "k_proj.bias" not in name] == [name for name in base if "embed" in name][:1]


def test_embeddings_that_are_the_head_cannot_be_frozen() -> None:
    frozen = TrainingSpec(frozen_embeddings=True)
    with pytest.raises(ValueError, match="must be left out where those of gpt2 are its head"):
        TrialSpec(model=ModelSpec(family="gpt2"), training=frozen)
    with pytest.raises(ValueError, match="must be left out where lora freezes them already"):
        TrialSpec(model=ModelSpec(lora=LoraSpec()), training=frozen)
    with pytest.raises(ValueError, match="that of the model is its head"):
        freeze(load_model(ModelSpec(family="gpt2"), seed=0), (), embeddings=True)


def test_a_trial_after_one_with_frozen_blocks_trains_all_of_them() -> None:
    free = TrialSpec(strings=StringsSpec(length=16), training=TrainingSpec(epochs=2), probes=ProbesSpec(num_held_out=0))
    frozen = free.model_copy(update={"training": TrainingSpec(epochs=2, learning_rate=1e-3, frozen_blocks=(1,))})
    shelf = ModelShelf()
    runs = [[each.record()["metrics"] for each in run_trial(spec, shelf=shelf)] for spec in (free, frozen, free)]
    assert runs[0] == runs[2]
    assert all(one != other for one, other in pairwise(runs))


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [((2, 1), "must ascend"), ((4,), r"among the blocks 0 to 3 of pythia tiny, but got \[4\]")],
)
def test_blocks_that_are_not_there_are_refused(blocks: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TrialSpec(training=TrainingSpec(frozen_blocks=blocks))
