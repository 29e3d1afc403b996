"""One pass against Hugging Face's own loss, a literal transcription, and laws that scoring must obey."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memray import scoring
from memray.encoding import Batch, Encoder, encode
from memray.families import FAMILIES
from memray.models import load_model
from memray.scoring import AlphabetIds, TokenScores, score, score_logits
from memray.spec import LoraSpec, ModelSpec

SYMBOL_IDS = np.arange(4, 11)
UNIFORM = AlphabetIds(torch.as_tensor(SYMBOL_IDS), torch.full((7,), 1 / 7))


def batch_of(lengths: list[int], *, bos: bool = False, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    encoder = Encoder(symbol_ids=SYMBOL_IDS, bos_id=0 if bos else None, pad_id=2)
    return encode([rng.integers(0, 7, length) for length in lengths], encoder)


def model_of(family: str) -> nn.Module:
    return load_model(ModelSpec(family=family), seed=3)


@pytest.fixture(scope="module")
def pythia() -> nn.Module:
    return model_of("pythia")


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("bos", [False, True])
def test_the_mean_nll_is_the_loss_that_hugging_face_computes(family: str, bos: bool) -> None:
    model, batch = model_of(family), batch_of([40, 40, 40], bos=bos)
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, labels=batch.ids).loss.item()
    assert -score(model, batch, UNIFORM).log_prob.mean() == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_changes_no_score(family: str) -> None:
    model, batch = model_of(family), batch_of([12, 30, 7], bos=True)
    together = score(model, batch, UNIFORM)
    for row, length in enumerate([12, 30, 7]):
        alone = batch.of(np.array([row]))
        alone = replace(
            alone,
            ids=alone.ids[:, : length + 1],
            is_target=alone.is_target[:, : length + 1],
            attention_mask=alone.attention_mask[:, : length + 1],
        )
        assert_same_scores(together.of(row), score(model, alone, UNIFORM))


def test_the_padding_token_does_not_matter(pythia: nn.Module) -> None:
    batch = batch_of([12, 30])
    padded_otherwise = replace(batch, ids=torch.where(batch.attention_mask == 1, batch.ids, 99))
    assert_same_scores(score(pythia, batch, UNIFORM), score(pythia, padded_otherwise, UNIFORM))


def test_order_and_batch_size_change_no_score(pythia: nn.Module) -> None:
    batch = batch_of([25, 25, 25, 25])
    together = score(pythia, batch, UNIFORM)
    backwards = score(pythia, batch.of(np.array([3, 2, 1, 0])), UNIFORM)
    for row in range(4):
        assert_same_scores(together.of(row), backwards.of(3 - row))
        assert_same_scores(together.of(row), score(pythia, batch.of(np.array([row])), UNIFORM))


def test_the_size_of_a_chunk_changes_no_score(pythia: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([25, 25])
    whole = score(pythia, batch, UNIFORM)
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 187 * 7)
    assert_same_scores(whole, score(pythia, batch, UNIFORM))


def test_the_head_never_makes_a_full_array_of_logits(pythia: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 187 * 7)
    largest = []
    hook = pythia.get_output_embeddings().register_forward_hook(lambda *call: largest.append(len(call[2])))  # type: ignore[operator]
    score(pythia, batch_of([25, 25]), UNIFORM)
    hook.remove()
    assert max(largest) == 7
    assert sum(largest) == 48


def test_without_bos_all_symbols_but_the_first_are_scored(pythia: nn.Module) -> None:
    scores = score(pythia, batch_of([5, 3]), UNIFORM)
    assert scores.string.tolist() == [0, 0, 0, 0, 1, 1]
    assert scores.position.tolist() == [1, 2, 3, 4, 1, 2]


def test_with_bos_all_symbols_are_scored(pythia: nn.Module) -> None:
    scores = score(pythia, batch_of([3, 2], bos=True), UNIFORM)
    assert scores.string.tolist() == [0, 0, 0, 1, 1]
    assert scores.position.tolist() == [0, 1, 2, 0, 1]


def test_adapters_are_scored_with_the_model_around_them() -> None:
    model, batch = load_model(ModelSpec(lora=LoraSpec(rank=2)), seed=3), batch_of([20])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        theirs = model(input_ids=batch.ids, labels=batch.ids).loss.item()
    assert -score(model, batch, UNIFORM).log_prob.mean() == pytest.approx(theirs, abs=1e-5)
    assert theirs != pytest.approx(-score(model_of("pythia"), batch, UNIFORM).log_prob.mean(), abs=1e-3)


def test_uniform_logits_give_closed_forms() -> None:
    columns = score_logits(torch.zeros(3, 187), torch.tensor([4, 5, 90]), UNIFORM)
    assert columns.log_prob.numpy() == pytest.approx(-math.log(187), rel=1e-6)
    assert columns.log_mass.numpy() == pytest.approx(math.log(7 / 187), rel=1e-6)
    assert columns.entropy_bits.numpy() == pytest.approx(math.log2(7), rel=1e-6)
    assert columns.kl_bits.numpy() == pytest.approx(0, abs=1e-6)
    assert columns.argmax.tolist() == [-1, -1, -1]
    assert columns.rank.tolist() == [0, 0, 0]
    assert columns.margin.tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 30), st.booleans())
def test_scores_equal_a_literal_transcription(seed: int, scale: float, has_ties: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 20)) * scale
    if has_ties:
        logits = np.round(logits / scale) * scale
    marginal = rng.dirichlet(np.ones(4))
    symbol_ids, targets = np.array([3, 7, 9, 15]), rng.integers(0, 20, 5)
    alphabet = AlphabetIds(torch.as_tensor(symbol_ids), torch.as_tensor(marginal, dtype=torch.float32))
    logits = logits.astype(np.float32)
    ours = score_logits(torch.as_tensor(logits), torch.as_tensor(targets), alphabet)
    for i, (row, target) in enumerate(zip(logits.astype(np.float64), targets, strict=True)):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        q = np.exp(row[symbol_ids] - row[symbol_ids].max())
        q /= q.sum()
        others = [value for token, value in enumerate(row) if token != target]
        winners = np.flatnonzero(row == row.max())
        assert ours.log_prob[i] == pytest.approx(
            row[target] - np.log(np.exp(row - row.max()).sum()) - row.max(), abs=1e-4
        )
        assert ours.log_mass[i].exp() == pytest.approx(p[symbol_ids].sum(), abs=1e-5)
        assert ours.argmax[i] == (winners[0] if len(winners) == 1 else -1)
        assert ours.rank[i] == sum(value > row[target] for value in row)
        assert ours.margin[i] == pytest.approx(row[target] - max(others), abs=1e-4)
        entropy = -sum(x * math.log2(x) for x in q if x > 0)
        assert ours.entropy_bits[i] == pytest.approx(entropy, abs=1e-4)
        log2_q = (
            row[symbol_ids] - row[symbol_ids].max() - np.log(np.exp(row[symbol_ids] - row[symbol_ids].max()).sum())
        ) / np.log(2)
        assert ours.kl_bits[i] == pytest.approx(
            float(np.sum(marginal * (np.log2(marginal) - log2_q))), rel=1e-4, abs=1e-4
        )
        assert ours.q[i].numpy() == pytest.approx(q, abs=1e-5)


def test_mean_q_is_the_average_over_a_strings_positions(pythia: nn.Module) -> None:
    batch = batch_of([10, 6])
    scores = score(pythia, batch, UNIFORM)
    with torch.no_grad():
        logits = pythia(input_ids=batch.ids).logits
    for row, length in enumerate([10, 6]):
        q = logits[row, : length - 1][:, SYMBOL_IDS].double().softmax(1).mean(0).numpy()
        assert scores.mean_q[row] == pytest.approx(q, abs=1e-6)


def test_records_of_several_passes_join_in_the_named_order(pythia: nn.Module) -> None:
    batch = batch_of([10, 10, 10])
    order = np.array([2, 0, 1])
    parts = [score(pythia, batch.of(order[:2]), UNIFORM), score(pythia, batch.of(order[2:]), UNIFORM)]
    joined, whole = TokenScores.concatenate(parts, order), score(pythia, batch, UNIFORM)
    assert_same_scores(joined, whole)


def assert_same_scores(ours: TokenScores, theirs: TokenScores) -> None:
    assert ours.position.tolist() == theirs.position.tolist()
    assert ours.argmax.tolist() == theirs.argmax.tolist()
    assert ours.rank.tolist() == theirs.rank.tolist()
    for name in ("log_prob", "log_mass", "margin", "entropy_bits", "kl_bits", "mean_q"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=2e-5), name


def test_a_bf16_model_is_scored_from_fp32_logits() -> None:
    model, batch = model_of("pythia"), batch_of([200])
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    scores = score(model, batch, UNIFORM)
    with torch.no_grad():
        hidden = model.base_model(input_ids=batch.ids).last_hidden_state[0, :-1]  # type: ignore[operator]
        logits = hidden.float() @ model.get_output_embeddings().weight.float().T  # type: ignore[operator]
    log_prob = logits.log_softmax(1).gather(1, batch.ids[0, 1:, None])[:, 0]
    assert scores.log_prob == pytest.approx(log_prob.numpy(), abs=1e-5)
    assert np.mean(scores.argmax == -1) < 0.01
