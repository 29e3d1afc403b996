"""The context probe against one prompt at a time through the plain model, and laws that it must obey."""

import copy
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from memray import context
from memray.context import Reader, mask_entries, packs, probe_context
from memray.encoding import Encoder, encode
from memray.families import FAMILIES
from memray.measures.prefix import FULL, ContextScores
from memray.models import load_model
from memray.probes import KEEPS, REPLACEMENTS, Condition, ContextSpec, Replacement, context_cost_tokens
from memray.replacements import Draws
from memray.scoring import AlphabetIds, score
from memray.spec import ModelSpec
from memray.strings import IidSource, Stream, draw_strings

SOURCE = IidSource(alphabet_size=7, entropy_bits=2.5)
OUTSIDE = np.arange(20, 40)
SHARED: tuple[Replacement, ...] = ("source", "other_string", "wrong", "outside", "constant")

each_family = pytest.mark.parametrize("family", sorted(FAMILIES))
either_bos = pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])


def sharpened(model: nn.Module) -> nn.Module:
    """The model with larger weights: an untrained one hardly hears what it has read."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 4
    return model


@cache
def model_of(family: str) -> nn.Module:
    return sharpened(load_model(ModelSpec(family=family), seed=3))


@pytest.fixture(scope="module")
def pythia() -> nn.Module:
    return model_of("pythia")


def encoder_of(bos: bool) -> Encoder:
    return Encoder(symbol_ids=np.arange(4, 11), bos_id=0 if bos else None, pad_id=2)


def strings_of(length: int, num_strings: int = 1, stream: Stream = "trained") -> ndarray:
    return draw_strings(SOURCE, length=length, num_strings=num_strings, seed=0, stream=stream)


def probed(model: nn.Module, strings: ndarray, spec: ContextSpec, *, bos: bool) -> ContextScores:
    return probe_context(model, strings, source=SOURCE, encoder=encoder_of(bos), outside_ids=OUTSIDE, spec=spec, seed=0)


def draws_of(string: ndarray, *, bos: bool) -> Draws:
    return Draws(string, 0, "trained", SOURCE, encoder_of(bos), OUTSIDE, 0)


# --- one prompt at a time ----------------------------------------------------------------------------------------


def literal_prompt(draws: Draws, condition: Condition, redraw: int, i: int) -> tuple[list[int], list[int]] | None:
    """The tokens before target i and, counted from the first symbol, where they stand; by the letter of the protocol.

    None where that target has no such prefix.
    """
    true, g = draws.ids.tolist(), i - condition.k
    if g < 0:
        return None
    remote, local = [*range(g)], [*range(g, i)]
    if condition.keep == "remote":
        replaced = local
    else:
        stays = draws.left_true(condition.remote_share, redraw)
        replaced = [j for j in remote if not stays[j]]
    tokens = dict(zip(remote + local, true[:i], strict=True))
    if condition.replacement == "shuffled":
        tokens |= dict(zip(replaced, draws.shuffled(np.array(replaced, dtype=np.int64), redraw).tolist(), strict=True))
    elif condition.replacement in ("none", "none_in_place"):
        tokens = {j: token for j, token in tokens.items() if j not in replaced}
    else:
        fresh = draws.replaced(condition.replacement, redraw)
        tokens |= {j: int(fresh[j]) for j in replaced}
    if condition.replacement == "none_in_place":
        return [*tokens.values()], [*tokens]
    return [*tokens.values()], [*range(len(tokens))]


@dataclass(frozen=True)
class Literal:
    """What the plain model says after one prompt."""

    log_prob: float
    log_mass: float
    is_right: bool


@torch.no_grad()
def read_literally(model: nn.Module, draws: Draws, condition: Condition, redraw: int, i: int) -> Literal | None:
    prompt = literal_prompt(draws, condition, redraw, i)
    if prompt is None:
        return None
    ids, places = [*draws.leading.tolist(), *prompt[0]], prompt[1]
    if not ids:
        return None
    if places == [*range(len(places))]:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    else:
        positions = torch.tensor([[0, *(1 + place for place in places)] if len(draws.leading) else places])
        # The mask keeps the jump between positions from being taken for the start of another text.
        ones = torch.ones_like(positions)
        logits = model(input_ids=torch.tensor([ids]), position_ids=positions, attention_mask=ones).logits[0, -1]
    log_p = logits.double().log_softmax(0)
    target = int(draws.ids[i])
    log_mass = log_p[torch.as_tensor(draws.encoder.symbol_ids)].logsumexp(0)
    return Literal(float(log_p[target]), float(log_mass), int(log_p.argmax()) == target)


def assert_read_literally(model: nn.Module, string: ndarray, spec: ContextSpec, *, bos: bool) -> int:
    """Every row equals one prompt through the plain model, and where that is undefined there is none."""
    scores, draws, num_rows = probed(model, string[None], spec, bos=bos), draws_of(string, bos=bos), 0
    for condition in spec.conditions(len(string)):
        own = scores.of(condition)
        for redraw in range(spec.redraws if condition.is_random else 1):
            expected = {i: read_literally(model, draws, condition, redraw, i) for i in range(len(string))}
            expected = {i: each for i, each in expected.items() if each is not None}
            rows = own.where(own.redraw == redraw)
            assert rows.position.tolist() == [*expected], condition
            assert rows.is_right.tolist() == [each.is_right for each in expected.values()], condition
            for name in ("log_prob", "log_mass"):
                theirs = [getattr(each, name) for each in expected.values()]
                assert getattr(rows, name) == pytest.approx(theirs, abs=1e-5), condition
            num_rows += len(expected)
    assert len(scores.string) == num_rows + len(scores.of(None).string)
    return num_rows


@each_family
@either_bos
def test_every_prediction_equals_that_of_one_prompt_through_the_plain_model(family: str, bos: bool) -> None:
    # Of both forms; one symbol longer than two blocks of tokens left true.
    spec = ContextSpec(keep=("local", "remote"), lengths=(0, 1, 4), redraws=1)
    assert assert_read_literally(model_of(family), strings_of(9)[0], spec, bos=bos) > 250


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@either_bos
def test_every_cell_of_the_grid_equals_that_of_one_prompt_through_the_plain_model(
    replacement: Replacement, bos: bool
) -> None:
    spec = ContextSpec(replacements=(), grid=True, grid_replacement=replacement, redraws=1)
    assert assert_read_literally(model_of("gpt2"), strings_of(10)[0], spec, bos=bos) > 60


def window_of(window: int, *, num_layers: int = 2) -> nn.Module:
    config = MistralConfig(
        vocab_size=187, hidden_size=32, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpened(MistralForCausalLM(config).eval())


def test_models_whose_heads_share_keys_are_read_alike() -> None:
    config = LlamaConfig(
        vocab_size=187, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sharpened(LlamaForCausalLM(config).eval())
    assert_read_literally(model, strings_of(12)[0], ContextSpec(lengths=(0, 3), redraws=1), bos=True)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@either_bos
def test_a_model_that_sees_only_a_window_is_read_alike(window: int, bos: bool) -> None:
    # Windows that end among the local tokens, among the remote ones, and where the two meet.
    spec = ContextSpec(keep=("local", "remote"), lengths=(0, 2, 4), redraws=1)
    assert assert_read_literally(window_of(window), strings_of(9)[0], spec, bos=bos) > 230


def test_what_stands_before_a_window_is_not_heard() -> None:
    # One block, which hands nothing on: a target hears the two tokens before it, whatever stands before them.
    scores = probed(window_of(2, num_layers=1), strings_of(30), ContextSpec(lengths=(1, 2, 5), redraws=1), bos=False)
    for k, is_heard in ((1, True), (2, False), (5, False)):
        own, full = scores.of(Condition("local", k, 0.0, "source")), scores.of(None)
        full = full.where(np.isin(full.position, own.position))
        assert bool(np.abs(own.log_prob - full.log_prob).max() > 1e-3) is is_heard


# --- the fast form -----------------------------------------------------------------------------------------------


@each_family
@torch.no_grad()
def test_packed_branches_say_what_independent_prompts_say(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(context.MASK_ENTRIES, "cpu", 5000)  # so that there are several packs
    model, draws = model_of(family), draws_of(strings_of(40)[0], bos=FAMILIES[family].bos)
    reader, head = Reader.of(model, draws.encoder.symbol_ids, SOURCE), model.get_output_embeddings()  # type: ignore[operator]
    true = draws.trunk(None, 1.0, 0)
    conditions = [Condition("local", 7, 0.0, name) for name in SHARED]
    conditions += [Condition("local", k, 0.0, "source") for k in (1, 25)]
    conditions += [Condition("local", 7, 0.5, name) for name in ("source", "none", "none_in_place")]
    conditions += [Condition("remote", k, 0.0, "source") for k in (1, 25)]
    conditions += [Condition("remote", 7, 0.0, name) for name in (*SHARED, "shuffled")]
    for condition in conditions:
        trunk = true if condition.keep == "remote" else draws.trunk(condition.replacement, condition.remote_share, 0)
        branches = draws.branches(trunk, condition, np.arange(condition.k, 40), 0)
        read = reader.trunk(trunk)
        ours, theirs = head(reader.behind(read, branches)), head(reader.after(branches.prompts(trunk)))
        assert ours.argmax(1).tolist() == theirs.argmax(1).tolist(), condition
        assert (ours - theirs).abs().max() < 1e-5, condition
        assert (ours.log_softmax(1) - theirs.log_softmax(1)).abs().max() < 1e-5, condition


def test_the_sizes_of_packs_and_batches_change_no_score(pythia: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, strings = ContextSpec(lengths=(0, 5), redraws=1), strings_of(24)
    whole = probed(pythia, strings, spec, bos=False)
    monkeypatch.setitem(context.MASK_ENTRIES, "cpu", 1)
    monkeypatch.setattr(context, "TOKENS_PER_PASS", 60)
    parts = probed(pythia, strings, spec, bos=False)
    assert whole.is_right.tolist() == parts.is_right.tolist()
    assert whole.log_prob == pytest.approx(parts.log_prob, abs=2e-5)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(0, 300), st.integers(1, 60), st.integers(1, 2**16))
def test_a_pack_has_a_bounded_mask_and_leaves_no_branch_out(count: int, first: int, k: int, limit: int) -> None:
    visible = np.arange(first, first + count)
    parts = list(packs(visible, k, limit))
    assert np.concatenate([visible[part] for part in parts]).tolist() == visible.tolist()
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        size = part.stop - part.start
        assert mask_entries(visible[part], k) == size * k * (visible[part][-1] + size * k)
        assert size == 1 or mask_entries(visible[part], k) <= limit
        if following is not None:
            assert mask_entries(visible[part.start : part.stop + 1], k) > limit, "there was room for another"


class Watch:
    """What a model's body is given: masks and tokens, pass by pass."""

    def __init__(self, model: nn.Module) -> None:
        self.masks: list[int] = []
        self.tokens: list[int] = []
        self.keys: list[int] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)  # type: ignore[operator, union-attr]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens.append(kwargs["input_ids"].numel())
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            self.masks.append(mask.numel())
            self.keys.append(mask.shape[-1] - mask.shape[-2])


def test_no_mask_of_a_long_string_exceeds_the_bound_and_no_pack_sees_another(pythia: nn.Module) -> None:
    model = copy.deepcopy(pythia)
    watch = Watch(model)
    spec = ContextSpec(lengths=(30,), replacements=("source",), redraws=1)
    probed(model, strings_of(400), spec, bos=False)
    assert len(watch.masks) > 10
    assert max(watch.masks) <= context.MASK_ENTRIES["cpu"]
    assert max(watch.tokens) <= 512
    assert max(watch.keys) < 400, "the keys of a pack must be those of its trunk"


def test_a_pack_of_one_branch_is_bounded_by_the_square_of_the_string() -> None:
    for k in range(1, 1024):
        assert mask_entries(np.array([1024 - k]), k) <= 1024**2


# --- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        ContextSpec(redraws=2, lengths=(0, 3)),
        ContextSpec(keep=("local", "remote"), lengths=(0, 2), shares=(0.5,), redraws=1, num_positions=5),
        ContextSpec(keep=("remote",), lengths=(0, 4), redraws=3),
        ContextSpec(replacements=("source",), grid=True, grid_replacement="shuffled", redraws=1),
        ContextSpec(replacements=(), extractable=(3, 8, 20)),
    ],
)
@either_bos
def test_the_cost_is_the_number_of_tokens_that_the_model_reads(
    spec: ContextSpec, bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "TOKENS_PER_PASS", 1)  # a prompt alone needs no padding
    model = load_model(ModelSpec(family="gpt2"), seed=0)
    watch = Watch(model)
    probed(model, strings_of(24), spec, bos=bos)
    assert sum(watch.tokens) == context_cost_tokens(spec, 24, bos=bos)


def test_the_cost_is_an_upper_bound_where_removed_in_place_is_the_same_as_removed(
    pythia: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "TOKENS_PER_PASS", 1)
    model, spec = copy.deepcopy(pythia), ContextSpec(replacements=("none", "none_in_place"), lengths=(3,))
    watch = Watch(model)
    probed(model, strings_of(40), spec, bos=False)
    assert sum(watch.tokens) == context_cost_tokens(spec, 40, bos=False) - 3 * 37


# --- laws --------------------------------------------------------------------------------------------------------


@each_family
@either_bos
def test_the_full_prefix_gives_the_ordinary_scores(family: str, bos: bool) -> None:
    model, strings = model_of(family), strings_of(30, num_strings=2)
    full = probed(model, strings, ContextSpec(lengths=(2,), replacements=("none",)), bos=bos).of(None)
    encoder = encoder_of(bos)
    alphabet = AlphabetIds(torch.as_tensor(encoder.symbol_ids), torch.as_tensor(np.array(SOURCE.marginal)).float())
    ordinary = score(model, encode(list(strings), encoder), alphabet)
    assert full.string.tolist() == ordinary.string.tolist()
    assert full.position.tolist() == ordinary.position.tolist()
    assert (
        full.is_right.tolist()
        == (ordinary.argmax == encoder.symbol_ids[strings][:, 0 if bos else 1 :].ravel()).tolist()
    )
    assert full.log_prob == pytest.approx(ordinary.log_prob, abs=1e-5)
    assert full.log_mass == pytest.approx(ordinary.log_mass, abs=1e-5)


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_where_nothing_stands_before_the_local_tokens_nothing_is_replaced(
    pythia: nn.Module, replacement: Replacement
) -> None:
    spec = ContextSpec(lengths=(1, 4, 9), replacements=(replacement,), redraws=1)
    scores = probed(pythia, strings_of(20), spec, bos=True)
    full = scores.of(None)
    for k in (1, 4, 9):
        own = scores.of(Condition("local", k, 0.0, replacement))
        assert own.log_prob[own.position == k] == pytest.approx(full.log_prob[full.position == k], abs=1e-5)


def test_replacing_what_stands_before_changes_what_is_predicted(pythia: nn.Module) -> None:
    spec = ContextSpec(keep=("local", "remote"), lengths=(0, 5), redraws=1)
    scores = probed(pythia, strings_of(30), spec, bos=True)
    seen = {condition: scores.of(condition) for condition in (None, *spec.conditions(30))}
    distinct = {own.log_prob[own.position >= 10].tobytes() for own in seen.values()}
    # Where nothing is left behind what is removed, nothing keeps its place: with k = 0, and where the rest is kept.
    assert len(distinct) == len(seen) - 2


@pytest.mark.parametrize(
    ("family", "is_rotary"),
    [
        ("pythia", True),
        ("phi", True),
        ("llama2", True),
        ("llama3", True),
        ("mistral", True),
        ("gpt2", False),
        ("opt", False),
    ],
)
def test_removed_in_place_is_recorded_as_removed_where_only_distances_count(family: str, is_rotary: bool) -> None:
    model, spec = model_of(family), ContextSpec(lengths=(0, 3), replacements=("none", "none_in_place"))
    for bos in (False, True):
        scores = probed(model, strings_of(12), spec, bos=bos)
        removed, in_place = (scores.of(Condition("local", 3, 0.0, name)) for name in ("none", "none_in_place"))
        is_same = removed.log_prob.tobytes() == in_place.log_prob.tobytes()
        assert is_same is (is_rotary and not bos)
        if is_rotary and not bos:
            draws = draws_of(strings_of(12)[0], bos=False)
            theirs = read_literally(model, draws, Condition("local", 3, 0.0, "none_in_place"), 0, 11)
            assert theirs is not None
            assert in_place.log_prob[-1] == pytest.approx(theirs.log_prob, abs=1e-5)


def test_nothing_before_the_target_is_missing_and_not_zero(pythia: nn.Module) -> None:
    spec = ContextSpec(lengths=(0, 2), replacements=("none", "none_in_place", "source"), keep=("local", "remote"))
    for bos in (False, True):
        scores = probed(pythia, strings_of(8), spec, bos=bos)
        first = 0 if bos else 1
        for name in ("none", "none_in_place"):
            alone = scores.of(Condition("local", 0, 0.0, name))
            assert alone.position.tolist() == ([*range(8)] if bos else [])
            behind = scores.of(Condition("remote", 2, 0.0, name))
            assert behind.position.tolist() == [*range(2 if bos else 3, 8)]
        fresh = scores.of(Condition("local", 0, 0.0, "source"))
        assert fresh.position[fresh.redraw == 0].tolist() == [*range(first, 8)]
        assert scores.of(None).position.tolist() == [*range(first, 8)]


def test_the_shuffled_context_is_probed_at_evenly_spaced_targets_that_all_lengths_share(pythia: nn.Module) -> None:
    spec = ContextSpec(lengths=(0, 5, 10), replacements=("shuffled", "none"), redraws=1, num_positions=6)
    scores = probed(pythia, strings_of(40), spec, bos=False)
    for k in (0, 5, 10):
        assert scores.of(Condition("local", k, 0.0, "shuffled")).position.tolist() == [10, 15, 20, 25, 30, 35]
    assert len(scores.of(Condition("local", 5, 0.0, "none")).position) == 35


def test_strings_are_probed_by_number_and_in_any_company_alike(pythia: nn.Module) -> None:
    spec = ContextSpec(lengths=(2,), replacements=("source",), num_strings=2, redraws=2)
    three, one = strings_of(16, num_strings=3), strings_of(16)
    together, alone = probed(pythia, three, spec, bos=False), probed(pythia, one, spec, bos=False)
    assert np.unique(together.string).tolist() == [0, 1]
    assert together.num_strings == 2
    assert together.where(together.string == 0).log_prob.tobytes() == alone.log_prob.tobytes()


def test_held_out_strings_have_draws_of_their_own(pythia: nn.Module) -> None:
    spec, string = ContextSpec(lengths=(2,), replacements=("source",), redraws=1), strings_of(16)
    settings = {"source": SOURCE, "encoder": encoder_of(False), "outside_ids": OUTSIDE, "spec": spec, "seed": 0}
    trained, held_out = (probe_context(pythia, string, stream=stream, **settings) for stream in ("trained", "held_out"))
    assert trained.of(None).log_prob.tobytes() == held_out.of(None).log_prob.tobytes()
    condition = Condition("local", 2, 0.0, "source")
    assert trained.of(condition).log_prob.tobytes() != held_out.of(condition).log_prob.tobytes()


def test_records_carry_the_codes_of_their_condition(pythia: nn.Module) -> None:
    scores = probed(pythia, strings_of(10), ContextSpec(lengths=(2,), replacements=("wrong",), redraws=2), bos=True)
    own, full = scores.of(Condition("local", 2, 0.0, "wrong")), scores.of(None)
    assert {REPLACEMENTS[code] for code in own.replacement} == {"wrong"}
    assert {KEEPS[code] for code in scores.keep} == {"local"}
    assert (set(own.redraw), set(full.redraw)) == ({0, 1}, {0})
    assert (set(full.k), set(full.replacement), set(full.remote_share)) == ({FULL}, {-1}, {1.0})
    assert len(scores.string) == 2 * 8 + 10


def test_a_probe_leaves_the_model_and_the_random_state_as_they_were(pythia: nn.Module) -> None:
    model = copy.deepcopy(pythia).train()
    model.base_model.layers[0].eval()  # type: ignore[union-attr, index]
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    spec = ContextSpec(lengths=(2,), redraws=1)
    trained, evaluated = (probed(each, strings_of(10), spec, bos=False) for each in (model, pythia))
    assert trained.log_prob.tobytes() == evaluated.log_prob.tobytes()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_repeats_itself_to_the_last_bit(pythia: nn.Module) -> None:
    spec, strings = ContextSpec(redraws=2, lengths=(0, 3)), strings_of(20)
    one, other = (probed(pythia, strings, spec, bos=False) for _ in range(2))
    assert all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ContextScores.COLUMNS)


def test_a_bf16_model_is_probed_nearly_as_its_fp32_twin(pythia: nn.Module) -> None:
    half = copy.deepcopy(pythia)
    for weight in half.parameters():
        weight.data = weight.data.bfloat16()
    spec, strings = ContextSpec(lengths=(0, 3), replacements=("source", "none"), redraws=1), strings_of(20)
    ours, theirs = (probed(model, strings, spec, bos=False) for model in (half, pythia))
    assert np.isfinite(ours.log_prob).all()
    assert np.median(np.abs(ours.log_prob - theirs.log_prob)) < 0.1


def test_a_model_of_which_only_some_blocks_see_a_window_is_refused_where_a_string_is_longer() -> None:
    config = Qwen2Config(
        vocab_size=187, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1,
    )  # fmt: skip
    model, spec = Qwen2ForCausalLM(config), ContextSpec(lengths=(2,), replacements=("source",), redraws=1)
    with pytest.raises(ValueError, match="some of qwen2 see 8 tokens and others more, and a string has 21; shorten"):
        probed(model, strings_of(20), spec, bos=False)
    assert len(probed(model, strings_of(7), spec, bos=False).string) > 0


def test_a_probe_of_no_string_is_refused(pythia: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one string, but the spec probes none of the held_out ones"):
        probe_context(
            pythia, strings_of(9), source=SOURCE, encoder=encoder_of(False), outside_ids=OUTSIDE,
            spec=ContextSpec(num_held_out=0), seed=0, stream="held_out",
        )  # fmt: skip


# --- extraction --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memoriser() -> tuple[nn.Module, ndarray]:
    """A model that has half learned a string by heart."""
    model, string = load_model(ModelSpec(), seed=0), strings_of(40)[0]
    ids = torch.as_tensor(encoder_of(False).symbol_ids[string])[None]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model.eval(), string


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_window_is_extractable_if_generation_after_its_first_half_gives_the_second(
    memoriser: tuple[nn.Module, ndarray], k: int
) -> None:
    model, string = memoriser
    ids = torch.as_tensor(encoder_of(False).symbol_ids[string])
    extracted = []
    for begin in range(len(string) - 2 * k + 1):
        prompt = ids[begin : begin + k][None]
        answer = model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=k, do_sample=False, eos_token_id=-1
        )[0, k:]
        extracted.append(torch.equal(answer, ids[begin + k : begin + 2 * k]))
    ours = probed(model, string[None], ContextSpec(replacements=(), extractable=(k,)), bos=False)
    assert ours.extractable.tolist() == [[np.mean(extracted)]]
    assert 0 < np.mean(extracted) < 1, "the comparison must have both kinds"


def test_a_string_shorter_than_a_window_has_no_extractable_share(pythia: nn.Module) -> None:
    shares = probed(pythia, strings_of(20), ContextSpec(replacements=(), extractable=(10, 11)), bos=True).extractable
    assert not math.isnan(shares[0, 0])
    assert math.isnan(shares[0, 1])
