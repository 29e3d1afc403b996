"""Rows of every kind of source: the same samples whatever the format, bad ones named, fewer the first of more."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from memray.corpora import NUM_RESERVED, CorpusSpec, Row, Rows, RowsSpec, duplicates, in_order, read_rows, shown
from memray.generators import GENERATORS, Sample
from memray.spec import ModelSpec, TrialSpec

ROWS = [{"prefix": f"Question {k}?", "reference": f"Answer {k}, and no other."} for k in range(20)]
GENERATED = RowsSpec(generator="questions")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_a_file_holds_the_same_rows_in_every_format(write: Callable[..., Path], tmp_path: Path):
    spec = RowsSpec(path=str(write(tmp_path / "rows", ROWS)))
    rows = read_rows(spec, num_samples=0, seed=0)
    assert [row.sample for row in rows.good] == [Sample(row["prefix"], row["reference"]) for row in ROWS]
    assert [row.place for row in rows.good] == list(range(20))
    assert not rows.bad


def test_fields_may_have_any_name_and_others_stand_beside_them(tmp_path: Path):
    rows = [{"id": k, "instruction": f" ask {k} ", "output": f"say {k}\n"} for k in range(3)]
    spec = RowsSpec(
        path=str(write_jsonl(tmp_path / "rows", rows)), prefix_field="instruction", reference_field="output"
    )
    assert read_rows(spec, num_samples=0, seed=0).good[1] == Row(1, Sample("ask 1", "say 1"))


def test_a_data_set_of_the_hub_is_read_by_the_library_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No network here: it lies in the library's cache, as a download leaves it. A newer one beside it is not taken."""
    from datasets import config
    from datasets.packaged_modules.parquet.parquet import Parquet
    from huggingface_hub import constants

    pinned, newer = "0" * 40, "refs/pr/1"
    rows = {pinned: ROWS, newer: ROWS[5:]}
    for revision in (pinned, newer):
        files = {"train": [str(write_parquet(tmp_path / "train-00000", rows[revision]))]}
        builder = Parquet(cache_dir=str(tmp_path / "made"), dataset_name="name", data_files=files)
        builder.download_and_prepare()
        of_revision = tmp_path / "cache" / "revisions" / revision.replace("/", "%2F")
        cache = of_revision / "owner___name" / "default" / "0.0.0" / pinned
        cache.parent.mkdir(parents=True)
        Path(builder.cache_dir).rename(cache)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for revision, expected in rows.items():
        spec = RowsSpec(hub_id="owner/name", revision=revision)
        found = [row.sample.prefix for row in read_rows(spec, num_samples=0, seed=0).good]
        assert found == [row["prefix"] for row in expected]
    with pytest.raises(ValueError, match=r"owner/name.* at 1{40} failed: .*begin the sweep where there is a network"):
        read_rows(RowsSpec(hub_id="owner/name", revision="1" * 40), num_samples=0, seed=0)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "train", ROWS[:3])  # which the library would read instead
    with pytest.raises(
        ValueError, match=r"must not be hidden by a folder, but 'owner/name' is one in .*; move it away"
    ):
        read_rows(RowsSpec(hub_id="owner/name", revision=pinned), num_samples=0, seed=0)


BAD = [
    ({"prefix": "a"}, "has no field 'reference'"),
    ({"prefix": "a", "reference": None}, "has no text in 'reference'"),
    ({"prefix": " ", "reference": "b"}, "has nothing in 'prefix'"),
    ({"prefix": 3, "reference": "b"}, "has no text in 'prefix'"),
]


@pytest.mark.parametrize(("row", "why"), BAD)
def test_a_bad_row_is_named_and_refused_or_counted_and_left_out(row: dict[str, Any], why: str, tmp_path: Path):
    path = str(write_jsonl(tmp_path / "rows", [*ROWS[:2], row, ROWS[2]]))
    with pytest.raises(ValueError, match=f"1 of .*rows.jsonl do not: row 2 {why}; mend them, or set") as raised:
        read_rows(RowsSpec(path=path), num_samples=0, seed=0)
    assert "rows.bad_rows='drop'" in str(raised.value)
    rows = read_rows(RowsSpec(path=path, bad_rows="drop"), num_samples=0, seed=0)
    assert [row.place for row in rows.good] == [0, 1, 3]
    assert rows.bad == {2: why}


def test_lines_that_are_no_rows_are_bad_ones(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prefix": "a", "reference": "b"}\nnot json\n[1]\n')
    rows = read_rows(RowsSpec(path=str(path), bad_rows="drop"), num_samples=0, seed=0)
    assert rows.bad[1].startswith("is no JSON (")
    assert rows.bad[2] == "is no JSON object"


def test_the_hash_covers_what_a_file_holds_and_not_where_it_is(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    first, second = (RowsSpec(path=str(write_jsonl(each / "rows", ROWS))) for each in (one, other))
    assert first.sha256 == second.sha256
    third = RowsSpec(path=str(write_jsonl(other / "rows", ROWS[1:])))
    assert third.sha256 != first.sha256
    with pytest.raises(ValueError, match="restore the file"):
        read_rows(second, num_samples=0, seed=0)


REFUSED = [
    (lambda: RowsSpec(), "exactly one of generator, path and hub_id, but got none"),
    (lambda: RowsSpec(generator="facts", hub_id="a/b"), "generator and hub_id"),
    (lambda: RowsSpec(generator="fact"), "did you mean 'facts'"),
    (lambda: RowsSpec(generator="biographies", options={"templates": 1}), "unknown option"),
    (lambda: RowsSpec(generator="biographies", split="test"), "split must keep the default"),
    (lambda: RowsSpec(path="rows.txt"), "must end in .jsonl, .csv, .parquet"),
    (lambda: RowsSpec(path="nowhere.jsonl"), "No such file"),
    (lambda: RowsSpec(hub_id="a/b", revision="../main"), "revision"),
    (lambda: RowsSpec(generator="facts", revision="0" * 40), "revision must keep the default"),
    (lambda: RowsSpec(hub_id="../../etc", revision="0" * 40), "hub_id"),
    (lambda: RowsSpec(hub_id="a/b", revision="0" * 40, text_field="t", prefix_field="p"), "choose one"),
    (lambda: CorpusSpec(rows=GENERATED, num_foreign=3), "belong together"),
    (lambda: CorpusSpec(rows=GENERATED, foreign=GENERATED), "belong together"),
    (lambda: CorpusSpec(rows=GENERATED, copies=3), "copied_share"),
    (lambda: CorpusSpec(rows=GENERATED, prefix_tokens=3), "both must be set or neither"),
    (lambda: CorpusSpec(rows=GENERATED, template="{reference} {prefix}"), "end with {reference}"),
    (lambda: CorpusSpec(rows=GENERATED, template="{reference}"), "hold {prefix} once"),
    (lambda: CorpusSpec(rows=GENERATED, template="Q {prefix} A {reference}", chat=True), "left out"),
    (lambda: CorpusSpec(rows=GENERATED, num_samples=10, samples_per_row=3), "take a divisor"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_with_a_sentence(make: Callable[[], object], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        make()


def test_an_option_at_its_default_is_no_other_corpus():
    def id_of(**options: Any) -> str:
        rows = RowsSpec(generator="biographies", options=options)
        return TrialSpec(corpus=CorpusSpec(rows=rows), model=ModelSpec(size="tiny-text")).trial_id()

    assert id_of() == id_of(num_templates=8) != id_of(num_templates=4)


# Which rows.


@pytest.mark.parametrize("name", GENERATORS)
def test_fewer_samples_are_the_first_of_more_and_held_out_ones_are_none_of_them(name: str):
    spec = RowsSpec(generator=name)
    few, many = (in_order(read_rows(spec, num_samples=n, seed=5), spec, 5) for n in (20, 50))
    assert [row.sample for row in few[0]] == [row.sample for row in many[0]][:20]
    assert few[1] == many[1]
    assert len(many[1]) == NUM_RESERVED
    assert not {row.sample.prefix for row in many[0]} & {row.sample.prefix for row in many[1]}


def test_rows_of_a_file_are_taken_in_an_order_of_the_seed_and_held_out_ones_from_its_end():
    rows = Rows([Row(k, Sample(f"p{k}", "r")) for k in range(100)], {})
    spec = RowsSpec(hub_id="a/b", revision="0" * 40)
    first, last = in_order(rows, spec, 0)
    assert last == first[::-1]
    assert sorted(row.place for row in first) == list(range(100))
    assert in_order(rows, spec, 0)[0] == first != in_order(rows, spec, 1)[0]


def test_copied_samples_are_shown_as_often_as_stated_and_all_others_once():
    spec = CorpusSpec(rows=GENERATED, num_samples=40, foreign=GENERATED, num_foreign=8, copied_share=0.25, copies=4)
    counts = Counter(shown(spec, seed=3))
    assert Counter(counts.values()) == {1: 38, 4: 10}
    assert all(index < 40 for index, count in counts.items() if count == 4)
    assert sum(counts.values()) == spec.num_rows_shown == 40 + 8 + 30
    assert shown(spec, seed=3) == shown(spec, seed=3) != shown(spec, seed=4)


def test_what_occurs_more_than_once_is_counted_whatever_its_case_and_blanks():
    samples = [Sample("A b", "c"), Sample("a  B", "C "), Sample("a b", "d"), Sample("e", "d"), Sample("f", "g")]
    assert duplicates(samples, [Sample("F", "g"), Sample("f", "h")]) == {
        "duplicates": 1,
        "duplicate_prefixes": 2,
        "duplicate_references": 2,
        "held_out_trained": 1,
    }


def test_a_prompt_ends_where_the_reference_begins_and_blanks_between_them_belong_to_it():
    spec = CorpusSpec(rows=GENERATED, template="Question: {prefix}\nAnswer: {reference}")
    assert spec.rendered(Sample("why?", "so")) == Sample("Question: why?\nAnswer:", " so")
