"""Samples as token ids: what is trained, what is scored, and what a template, a chat or a cut makes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from memray import samples as module
from memray.corpora import CorpusSpec, RowsSpec
from memray.models import text_tokenizer
from memray.probes import ProbesSpec
from memray.samples import FOREIGN, HELD_OUT, NATIVE, Samples, by_role, prepare_samples
from memray.spec import ModelSpec, TrainingSpec, TrialSpec

TOKENIZER = text_tokenizer()


def corpus(**changes: Any) -> CorpusSpec:
    return CorpusSpec(**({"rows": {"generator": "questions"}, "num_samples": 12} | changes))


def trial(*, bos: bool = False, num_held_out: int = 4, seed: int = 0, **changes: Any) -> TrialSpec:
    return TrialSpec(
        corpus=corpus(**changes),
        model=ModelSpec(size="tiny-text", bos=bos),
        training=TrainingSpec(epochs=2),
        probes=ProbesSpec(num_held_out=num_held_out),
        string_seed=seed,
    )


def written(folder: Path, rows: list[dict[str, Any]]) -> RowsSpec:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowsSpec(path=str(path))


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[return-value]


def row_of(samples: Samples, index: int) -> tuple[list[int], list[int]]:
    """The tokens of a row as it is trained, and those that are targets."""
    own, mask = samples.trained.ids[index], samples.trained.attention_mask[index].bool()
    return own[mask].tolist(), own[samples.trained.is_target[index]].tolist()


@pytest.mark.parametrize("bos", [False, True])
def test_a_sample_is_its_prompt_and_its_reference_and_the_end_and_the_last_two_are_trained(bos: bool):
    samples = prepare_samples(trial(bos=bos, template="Q: {prefix} A: {reference}"))
    for index in range(12):
        text = samples.known[index].text
        prompt = [0] * bos + ids(f"Q: {text.prefix} A:")
        reference = ids(f" {text.reference}")
        assert row_of(samples, index) == ([*prompt, *reference, 1], [*reference, 1])


def test_all_of_a_sample_but_its_first_token_is_trained_where_the_spec_says_so():
    samples = prepare_samples(trial(targets="whole", ends=False))
    for index in range(12):
        tokens, targets = row_of(samples, index)
        assert targets == tokens[1:]
        assert tokens[-1] != 1


def test_scored_rows_are_those_that_are_trained_without_their_end_the_longest_first():
    samples = prepare_samples(trial())
    assert sorted(samples.order.tolist()) == list(range(16))
    lengths = samples.scored.attention_mask.sum(1).numpy()
    assert (np.diff(lengths) <= 0).all()
    for row, index in enumerate(samples.order):
        sample = samples.known[index]
        assert samples.scored.ids[row, : lengths[row]].tolist() == sample.ids.tolist()
        targets = samples.scored.ids[row][samples.scored.is_target[row]]
        assert targets.tolist() == sample.reference_ids.tolist()


def test_roles_are_native_then_foreign_then_held_out():
    samples = prepare_samples(trial(foreign={"generator": "puzzles"}, num_foreign=3, max_tokens=256))
    assert {role: own.tolist() for role, own in by_role(samples.known)} == {
        NATIVE: list(range(12)),
        FOREIGN: [12, 13, 14],
        HELD_OUT: [15, 16, 17, 18],
    }
    assert len(samples.trained.ids) == 15
    assert samples.num_held_out == 4


def test_native_samples_are_the_same_with_or_without_others_beside_them():
    alone = prepare_samples(trial())
    beside = prepare_samples(trial(foreign={"generator": "facts"}, num_foreign=3, num_samples=20))
    assert [each.text for each in beside.known[:12]] == [each.text for each in alone.known[:12]]


def test_copies_are_rows_of_their_own_and_are_scored_once():
    samples = prepare_samples(trial(copied_share=0.5, copies=3))
    rows = [tuple(row_of(samples, index)[0]) for index in range(len(samples.trained.ids))]
    assert sorted(rows.count(row) for row in set(rows)) == [1] * 6 + [3] * 6
    assert len(samples.scored.ids) == 16


def test_packed_samples_stand_one_behind_the_other():
    single, packed = prepare_samples(trial()), prepare_samples(trial(samples_per_row=3))
    assert len(packed.trained.ids) == 4
    for row in range(4):
        joined = [row_of(single, 3 * row + k) for k in range(3)]
        assert row_of(packed, row) == tuple([token for each in joined for token in each[part]] for part in (0, 1))
    assert packed.digest != single.digest


def test_text_that_spells_a_special_token_is_text(tmp_path: Path):
    rows = written(tmp_path, [{"prefix": "say <eos>", "reference": "<bos> so"}])
    samples = prepare_samples(trial(rows=rows, num_samples=1, num_held_out=0, ends=False))
    assert not {0, 1, 2, 3} & {*samples.known[0].ids.tolist()}


def test_a_text_is_cut_at_a_token(tmp_path: Path):
    texts = [{"text": f"number {k} is followed by number {k + 1}, and so on for ever."} for k in range(6)]
    path = written(tmp_path, texts).path
    rows = {"path": path, "text_field": "text"}
    samples = prepare_samples(trial(rows=rows, num_samples=4, num_held_out=2, prefix_tokens=5))
    for sample in samples.known:
        whole = ids(texts[sample.place]["text"])
        assert sample.prompt_ids.tolist() == whole[:5]
        assert sample.reference_ids.tolist() == whole[5:]
        assert sample.text.prefix + sample.text.reference == texts[sample.place]["text"]
    assert not {each.place for each in samples.known[:4]} & {each.place for each in samples.known[4:]}


def test_a_text_that_is_too_short_to_cut_is_refused(tmp_path: Path):
    rows = {"path": written(tmp_path, [{"text": "short"}] * 3).path, "text_field": "text"}
    with pytest.raises(ValueError, match="has 2 tokens, and is cut at 5"):
        prepare_samples(trial(rows=rows, num_samples=2, num_held_out=0, prefix_tokens=5))


LONG = [{"prefix": f"p {k}", "reference": "a b c d" if k % 2 else "a " * 40} for k in range(10)]


def test_rows_that_are_too_long_are_refused_left_out_or_cut(tmp_path: Path):
    rows = written(tmp_path, LONG)
    stated = {"rows": rows, "num_held_out": 1, "max_tokens": 12}
    with pytest.raises(ValueError, match=r"of .*rows.jsonl do not: row \d+ has 4\d tokens, [23] of them a prompt"):
        prepare_samples(trial(**stated, num_samples=4))
    dropped = prepare_samples(trial(**stated, num_samples=4, too_long="drop"))
    assert {each.place % 2 for each in dropped.known} == {1}
    assert dropped.report["too_long"] > 0
    cut = prepare_samples(trial(**stated, num_samples=9, too_long="cut"))
    for sample in cut.known:
        assert sample.is_cut == (sample.place % 2 == 0)
        if sample.is_cut:  # as much as there is room for beside the end, which it has not
            assert len(sample.ids) == 11
    assert cut.report["cut"] == sum(each.is_cut for each in cut.known) > 0
    ends = [row_of(cut, index)[0][-1] == 1 for index in range(9)]
    assert ends == [not each.is_cut for each in cut.known[:9]]


def test_too_few_rows_are_refused_and_no_row_is_both_trained_and_held_out(tmp_path: Path):
    rows = written(tmp_path, [row for row in LONG if len(row["reference"]) < 10])
    with pytest.raises(ValueError, match="must have 4 rows to train and 2 to hold out, but of 5 good rows 0 are too"):
        prepare_samples(trial(rows=rows, num_samples=4, num_held_out=2))
    samples = prepare_samples(trial(rows=rows, num_samples=4, num_held_out=1))
    assert len({each.place for each in samples.known}) == 5


def test_the_digest_changes_with_every_token_and_with_what_is_trained_of_it_alone():
    digests = {
        prepare_samples(spec).digest
        for spec in (
            trial(),
            trial(seed=1),
            trial(bos=True),
            trial(targets="whole"),
            trial(ends=False),
            trial(num_held_out=3),
            trial(copied_share=0.5),
        )
    }
    assert len(digests) == 7
    assert prepare_samples(trial()).digest == prepare_samples(trial(max_tokens=100)).digest


CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_makes_the_prompt(monkeypatch: pytest.MonkeyPatch):
    def with_chat(spec: ModelSpec) -> PreTrainedTokenizerFast:
        tokenizer = text_tokenizer()
        tokenizer.chat_template = CHAT
        return tokenizer

    monkeypatch.setattr(module, "load_tokenizer", with_chat)
    samples = prepare_samples(trial(chat=True, bos=True))
    for sample in samples.known:
        assert TOKENIZER.decode(sample.prompt_ids) == f"<user>{sample.text.prefix}<assistant>"
        assert TOKENIZER.decode(sample.reference_ids) == sample.text.reference


def test_a_chat_needs_a_tokenizer_with_a_template():
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        prepare_samples(trial(chat=True))
