"""What a trial is: its identity, what is filled in, what is refused, and how it is flattened."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from memray.corpora import CorpusSpec, RowsSpec
from memray.curriculum import CurriculumSpec, OtherSpec
from memray.families import FAMILIES
from memray.spec import (
    UNHASHED,
    ComputeSpec,
    InContextSpec,
    LoraSpec,
    ModelSpec,
    Part,
    ProbesSpec,
    StopWhen,
    StringsSpec,
    TrainingSpec,
    TrialSpec,
)
from memray.strings import ALPHABETS, IidSource, MarkovSource, MotifSource
from memray.sweep import vary

KINDS = get_args(StringsSpec.model_fields["kind"].annotation)
PYTHIA_1B = TrialSpec(model=ModelSpec(size="1b", pretrained=True))

# Ids of finished trials are kept in ledgers and in MLflow: if one of these changes, every trial ever run is run again.
GOLDEN = {
    "the default": (TrialSpec(), "9b384eaf12fc", "9b384eaf12fc"),
    "a skewed source and seeds": (
        TrialSpec(
            strings=StringsSpec(alphabet_size=7, entropy_bits=2.0, skew="zipf", length=256),
            string_seed=3,
            model_seed=3,
        ),
        "a34e94a71cb7",
        "a224cdf41fe5",
    ),
    "a pretrained model": (PYTHIA_1B, "997057f96aec", "997057f96aec"),
    "a family with a BOS on an accelerator": (
        TrialSpec(
            model=ModelSpec(family="llama2", size="7b", pretrained=True), compute=ComputeSpec(accelerator="h100-80gb")
        ),
        "1dc7ae58ac45",
        "1dc7ae58ac45",
    ),
    "adapters, a criterion and many strings": (
        TrialSpec(
            strings=StringsSpec(num_strings=16, length=64, alphabet="greek", alphabet_size=24),
            model=ModelSpec(family="gpt2", lora=LoraSpec(target_modules=("c_attn",)), dropout=0.1),
            training=TrainingSpec(epochs=60, strings_per_step=0, stop_when=StopWhen(epochs=3), schedule="constant"),
            order_seed=5,
        ),
        "4c45efb16193",
        "2c2034d13707",
    ),
    "symbols that depend on each other": (
        TrialSpec(strings=StringsSpec(kind="markov", order=2, conditional_entropy_bits=1.5, length=256)),
        "f48cd5818994",
        "f48cd5818994",
    ),
    "a motif over and over": (
        TrialSpec(strings=StringsSpec(kind="repeated", motif_length=32, entropy_bits=2.0), string_seed=1),
        "3f816294d921",
        "a55d70271097",
    ),
    "motifs of motifs": (
        TrialSpec(strings=StringsSpec(kind="hierarchical", branching=3)),
        "e680780d986f",
        "e680780d986f",
    ),
    "a text": (
        TrialSpec(strings=StringsSpec(kind="text", path="wherever it lies", sha256="0123456789abcdef" * 4)),
        "892b53aff107",
        "892b53aff107",
    ),
    "plain gradient descent on a directory": (
        TrialSpec(
            model=ModelSpec(path="models/mine", bos=True),
            training=TrainingSpec(optimiser="sgd", momentum=0.9, learning_rate=0.01, keep_weights="final"),
            compute=ComputeSpec(precision="bf16", threads=2),
        ),
        "306761d9a1e3",
        "306761d9a1e3",
    ),
}


@pytest.mark.parametrize("what", GOLDEN)
def test_an_id_never_changes(what: str) -> None:
    spec, trial_id, cell_id = GOLDEN[what]
    assert (spec.trial_id(), spec.cell_id()) == (trial_id, cell_id)


def test_the_id_of_the_default_probes_never_changes() -> None:
    assert ProbesSpec().probes_id() == "44136fa355b3"
    assert ProbesSpec(epochs=(0, 10), num_held_out=3, compared_strings=1).probes_id() == "b1dc19fa12d1"


def differing(part: Part) -> dict[str, Any]:
    """The rule of the hash, spelled out: what differs from the class's own default, and parts that are switched on."""
    found: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, Part):
            inner = differing(value)
            if inner or field.default is None:
                found[name] = inner
        elif value != field.default:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


def expected_json(spec: TrialSpec, *, without: tuple[str, ...] = ("probes",)) -> str:
    found = differing(spec)
    strings, compute = found.get("strings", {}), found.get("compute", {})
    for name in UNHASHED:
        compute.pop(name, None)
    strings.pop("path", None)
    entropy_bits, conditional_bits = spec.strings.entropy_bits, spec.strings.conditional_entropy_bits
    if entropy_bits is None or entropy_bits >= math.log2(spec.strings.alphabet_size) - 1e-9:
        strings.pop("entropy_bits", None)
        strings.pop("skew", None)
        entropy_bits = math.log2(spec.strings.alphabet_size)
    if conditional_bits is None or conditional_bits >= entropy_bits - 1e-9:
        strings.pop("conditional_entropy_bits", None)
        strings.pop("order", None)
    if not strings:
        found.pop("strings", None)
    kept = {name: value for name, value in found.items() if name not in without}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


@st.composite
def valid_sources(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(KINDS))
    if kind == "text":
        return {"kind": kind, "path": __file__, "length": draw(st.integers(2, 1000))}
    alphabet = draw(st.sampled_from([*ALPHABETS]))
    size = draw(st.integers(2, len(ALPHABETS[alphabet])))
    largest, share = math.log2(size), st.floats(0.01, 1)
    drawn: dict[str, Any] = {"kind": kind, "alphabet": alphabet, "alphabet_size": size}
    drawn["entropy_bits"] = draw(st.none() | share.map(lambda part: part * largest))
    drawn["skew"] = draw(st.sampled_from(["one-token", "geometric", "zipf"]))
    least = 2
    if kind == "markov":
        drawn["order"] = draw(st.integers(1, 5))
        largest = largest if drawn["entropy_bits"] is None else drawn["entropy_bits"]
        drawn["conditional_entropy_bits"] = draw(st.none() | share.map(lambda part: part * largest))
        least = drawn["order"] + 1
    elif kind == "repeated":
        least = drawn["motif_length"] = draw(st.integers(2, 300))
    elif kind == "hierarchical":
        drawn |= {"motif_length": draw(st.integers(2, 9)), "depth": draw(st.integers(1, 3))}
        drawn["branching"] = draw(st.integers(3, 5))
        least = 2 * drawn["motif_length"] * drawn["branching"] ** (drawn["depth"] - 1) + 1
    return drawn | {"length": draw(st.integers(least, 1000))}


@st.composite
def valid_specs(draw: st.DrawFn) -> TrialSpec:
    def some(**fields: st.SearchStrategy[Any]) -> dict[str, Any]:
        """Any subset of the fields; the others keep their defaults."""
        return {name: draw(values) for name, values in fields.items() if draw(st.booleans())}

    num_strings = draw(st.integers(1, 12))
    per_step = draw(st.sampled_from([0, *(k for k in range(1, 13) if num_strings % k == 0)]))
    lora = st.builds(
        LoraSpec,
        rank=st.integers(1, 64),
        alpha=st.floats(0.5, 64),
        target_modules=st.none() | st.lists(st.text("abc_.", min_size=1), min_size=1).map(tuple),
    )
    family = draw(st.sampled_from([*FAMILIES]))
    model = some(
        size=st.sampled_from([*FAMILIES[family].sizes]),
        bos=st.none() | st.booleans(),
        dropout=st.floats(0, 0.9),
        lora=st.none() | lora,
    )
    if not model.get("size", "tiny").startswith("tiny"):
        model["pretrained"] = draw(st.booleans())
    optimisers: list[Literal["adamw", "sgd"]] = ["adamw", "sgd"]
    optimiser = draw(st.sampled_from(optimisers))
    training = some(
        epochs=st.none() | st.integers(1, 500),
        learning_rate=st.none() | st.floats(1e-8, 1),
        schedule=st.sampled_from(["linear", "constant", "cosine"]),
        warmup_steps=st.integers(0, 9),
        stop_when=st.none() | st.builds(StopWhen, at_least=st.floats(-1, 1), epochs=st.integers(1, 9)),
        gradient_checkpointing=st.booleans(),
        **({"momentum": st.floats(0, 0.99)} if optimiser == "sgd" else {"beta1": st.floats(0, 0.99)}),
    )
    compute = some(
        accelerator=st.sampled_from(["cpu", "t4", "h200"]),
        threads=st.integers(1, 8),
        precision=st.sampled_from([None, "fp32", "bf16"]),
        device_share=st.floats(0.01, 1),
    )
    if draw(st.booleans()):
        compute = compute | {"engine": "deepspeed", "device_share": 1.0, "zero_stage": draw(st.integers(0, 3))}
        compute["workers"] = draw(st.sampled_from([1, num_strings, num_strings + 1]))
    seed = st.integers(0, 2**32 - 1)
    return TrialSpec(
        strings=StringsSpec(num_strings=num_strings, **draw(valid_sources())),
        model=ModelSpec(family=family, **model),
        training=TrainingSpec(optimiser=optimiser, strings_per_step=per_step, **training),
        compute=ComputeSpec(**compute),
        probes=ProbesSpec(**some(num_held_out=st.integers(0, 20), compared_strings=st.integers(0, num_strings))),
        **some(string_seed=seed, model_seed=seed, order_seed=seed),
    )


@given(valid_specs())
@settings(max_examples=100, deadline=None)
def test_an_id_hashes_the_canonical_json_of_what_differs_from_the_defaults(spec: TrialSpec) -> None:
    assert spec.canonical_json() == expected_json(spec)
    assert spec.trial_id() == sha(expected_json(spec))
    assert spec.cell_id() == sha(expected_json(spec, without=("probes", "string_seed", "model_seed", "order_seed")))
    assert spec.probes.probes_id() == sha(json.dumps(differing(spec.probes), sort_keys=True, separators=(",", ":")))


@given(valid_specs())
@settings(max_examples=100, deadline=None)
def test_a_round_trip_through_json_keeps_the_spec_and_its_ids(spec: TrialSpec) -> None:
    back = TrialSpec.model_validate_json(spec.model_dump_json())
    assert back == spec
    assert back.trial_id() == spec.trial_id()
    assert back.cell_id() == spec.cell_id()
    assert back.probes.probes_id() == spec.probes.probes_id()
    assert back.params() == spec.params()


@given(valid_specs(), valid_specs())
@settings(max_examples=60, deadline=None)
def test_params_have_the_same_keys_for_every_spec_and_fit_into_mlflow(one: TrialSpec, other: TrialSpec) -> None:
    assert one.params().keys() == other.params().keys()
    for value in one.params().values():
        assert isinstance(value, str | int | float | bool)
        assert 0 < len(str(value)) <= 6000
        assert value is not None
        assert value == value  # no nan


# Identity: what counts, and what does not.


def test_a_field_spelled_out_at_its_default_does_not_enter_the_hash() -> None:
    spelled = TrialSpec.model_validate_json(TrialSpec().model_dump_json())
    assert spelled.model_fields_set > TrialSpec().model_fields_set
    assert spelled.trial_id() == TrialSpec().trial_id()


def test_only_what_the_family_table_filled_in_is_left_of_the_default_spec() -> None:
    assert json.loads(TrialSpec().canonical_json()) == {
        "compute": {"precision": "fp32"},
        "model": {"bos": False},
        "training": {"epochs": 300, "learning_rate": 0.001},
    }


@pytest.mark.parametrize(
    "looked_at_or_placed",
    [
        {"probes": {"num_held_out": 0}},
        {"probes": {"epochs": [0, 7]}},
        {"probes": {"compared_strings": 1}},
        {"compute": {"device_share": 0.25}},
        {"compute": {"checkpoint_s": 0}},
        {"compute": {"logs_communication": True}},
    ],
)
def test_probes_and_placement_leave_the_trial_id_alone(looked_at_or_placed: dict[str, Any]) -> None:
    spec = TrialSpec(**looked_at_or_placed)
    assert spec.trial_id() == TrialSpec().trial_id()
    assert spec.params() == TrialSpec().params()


CHANGES: dict[str, Any] = {
    "strings": [{"length": 64}, {"alphabet": "greek", "alphabet_size": 24}, {"entropy_bits": 2.0}, {"num_strings": 2},
                {"entropy_bits": 2.0, "skew": "zipf"}, {"kind": "markov"},
                {"kind": "markov", "conditional_entropy_bits": 1.0},
                {"kind": "markov", "conditional_entropy_bits": 1.0, "order": 2},
                {"kind": "repeated"}, {"kind": "repeated", "motif_length": 32},
                {"kind": "hierarchical"}, {"kind": "hierarchical", "motif_length": 32},
                {"kind": "hierarchical", "depth": 1}, {"kind": "hierarchical", "branching": 3},
                {"kind": "text", "path": __file__}, {"kind": "text", "path": __file__, "sha256": "0" * 64}],
    "model": [{"family": "phi"}, {"bos": True}, {"dropout": 0.1}, {"lora": {}}, {"lora": {"rank": 4}},
              {"path": "here"}],
    "training": [{"epochs": 7}, {"learning_rate": 0.1}, {"schedule": "cosine"}, {"optimiser": "sgd"}, {"beta1": 0.8},
                 {"clip_norm": 0}, {"stop_when": {}}, {"stop_when": {"epochs": 2}}, {"gradient_checkpointing": True},
                 {"keep_weights": "final"}, {"warmup_steps": 1}, {"weight_decay": 0.1}],
    "compute": [{"threads": 2}, {"precision": "bf16"}, {"accelerator": "t4", "precision": "fp32"},
                {"engine": "deepspeed"}, {"engine": "deepspeed", "workers": 2},
                {"engine": "deepspeed", "zero_stage": 1},
                {"engine": "deepspeed", "zero_stage": 1, "offload": "optimiser"}],
}  # fmt: skip


def test_every_change_to_what_is_trained_has_an_id_of_its_own() -> None:
    specs = [TrialSpec(**{part: change}) for part, changes in CHANGES.items() for change in changes]
    specs += [TrialSpec(), TrialSpec(string_seed=1), TrialSpec(model_seed=1), TrialSpec(order_seed=1)]
    assert len({spec.trial_id() for spec in specs}) == len(specs)
    assert len({spec.cell_id() for spec in specs}) == len(specs) - 3


@pytest.mark.parametrize("alphabet_size", [2, 4, 7, 13, 26])
@pytest.mark.parametrize("skew", ["one-token", "geometric", "zipf"])
def test_a_uniform_source_has_one_id_however_it_is_spelled(alphabet_size: int, skew: Any) -> None:
    plain = TrialSpec(strings=StringsSpec(alphabet_size=alphabet_size))
    for entropy_bits in (None, math.log2(alphabet_size), math.log2(alphabet_size) - 1e-10):
        spelled = TrialSpec(
            strings=StringsSpec(alphabet_size=alphabet_size, entropy_bits=entropy_bits, skew=skew),
        )
        assert spelled.trial_id() == plain.trial_id()
        assert spelled.params() == plain.params() | {"strings.skew": skew}
        assert spelled.source() == plain.source()


@pytest.mark.parametrize("order", [1, 3])
def test_symbols_that_depend_on_nothing_have_one_id_however_that_is_spelled(order: int) -> None:
    plain = TrialSpec(strings=StringsSpec(kind="markov", entropy_bits=2.0))
    for conditional_entropy_bits in (None, 2.0, 2.0 - 1e-10):
        strings = plain.strings.model_copy(
            update={"order": order, "conditional_entropy_bits": conditional_entropy_bits}
        )
        spelled = TrialSpec(strings=strings)
        assert spelled.trial_id() == plain.trial_id()
        assert spelled.params() == plain.params() | {"strings.order": order}
        assert spelled.source() == plain.source()


def test_the_source_of_a_trial_is_the_one_that_its_spec_describes() -> None:
    fresh = IidSource(alphabet_size=7, entropy_bits=2.0, skew="zipf")
    shared: dict[str, Any] = {"alphabet_size": 7, "entropy_bits": 2.0, "skew": "zipf"}
    expected = {
        "iid": ({}, fresh),
        "markov": (
            {"order": 3, "conditional_entropy_bits": 0.5},
            MarkovSource(fresh=fresh, order=3, conditional_entropy_bits=0.5, seed=9),
        ),
        "repeated": ({"motif_length": 5}, MotifSource(fresh=fresh, motif_length=5)),
        "hierarchical": (
            {"motif_length": 5, "depth": 1, "branching": 3},
            MotifSource(fresh=fresh, motif_length=5, depth=1, branching=3),
        ),
    }
    assert {*expected, "text"} == {*KINDS}
    for kind, (fields, source) in expected.items():
        spec = TrialSpec(strings=StringsSpec(kind=kind, **shared, **fields), string_seed=9)  # type: ignore[arg-type]
        assert spec.source() == source
        assert spec.source().kind == kind


def test_the_content_of_a_text_is_hashed_and_its_place_is_not(tmp_path: Path) -> None:
    for name, content in (("one", "abc"), ("same", "abc"), ("other", "abd")):
        (tmp_path / name).write_text(content)
    one, same, other = (
        TrialSpec(strings=StringsSpec(kind="text", path=str(tmp_path / name))) for name in ("one", "same", "other")
    )
    assert one.strings.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert one.trial_id() == same.trial_id() != other.trial_id()
    assert one.params() == same.params()
    assert "strings.path" not in one.params()
    assert one.strings.text() == "abc"


def test_a_text_that_is_another_one_by_now_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc")
    spec = TrialSpec(strings=StringsSpec(kind="text", path=str(tmp_path / "text")))
    (tmp_path / "text").write_text("abd")
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec, "a spec is made once"
    with pytest.raises(ValueError, match=r"must hold the text that the spec was made from, .*; restore the file"):
        spec.strings.text()


def test_a_varied_path_is_another_text(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text(name)
    base = TrialSpec(strings=StringsSpec(kind="text", path=str(tmp_path / "one")))
    varied = vary(base, {"strings.path": str(tmp_path / "other")})
    assert isinstance(varied, TrialSpec)
    assert varied.strings.text() == "other"


def test_the_path_of_a_text_is_meant_from_where_the_spec_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("abc")
    monkeypatch.chdir(tmp_path)
    spec = StringsSpec(kind="text", path="text")
    monkeypatch.chdir("/")
    assert spec.text() == "abc"


def test_almost_uniform_is_not_uniform() -> None:
    almost = TrialSpec(strings=StringsSpec(entropy_bits=math.log2(26) - 1e-6))
    assert almost.trial_id() != TrialSpec().trial_id()


def test_a_spec_is_frozen_and_can_be_a_key() -> None:
    spec = TrialSpec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.string_seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        spec.training.epochs = 1
    assert hash(TrialSpec()) == hash(TrialSpec()) != hash(TrialSpec(string_seed=1))


# What the family table fills in.


PHI_2, GPT2, LLAMA2, OPT = (
    FAMILIES[family].sizes[size].revision
    for family, size in (("phi", "2"), ("gpt2", "124m"), ("llama2", "7b"), ("opt", "125m"))
)


@pytest.mark.parametrize(
    ("model", "epochs", "learning_rate", "bos", "revision"),
    [
        ({}, 300, 1e-3, False, None),
        ({"family": "llama2"}, 300, 1e-3, True, None),
        ({"family": "opt"}, 300, 1e-3, True, None),
        ({"size": "1b", "pretrained": True}, 100, 1e-5, False, "step143000"),
        ({"size": "70m-deduped"}, 300, 1e-5, False, "step143000"),
        ({"size": "1b", "pretrained": True, "revision": "step1000"}, 100, 1e-5, False, "step1000"),
        ({"family": "phi", "size": "2", "pretrained": True}, 100, 1e-5, False, PHI_2),
        ({"family": "gpt2", "size": "124m", "pretrained": True}, 100, 1e-5, False, GPT2),
        ({"family": "llama2", "size": "7b", "pretrained": True}, 100, 5e-6, True, LLAMA2),
        ({"family": "opt", "size": "125m", "pretrained": True}, 100, 5e-6, True, OPT),
        ({"family": "opt", "size": "125m", "pretrained": True, "bos": False}, 100, 5e-6, False, OPT),
        ({"path": "here"}, 300, 1e-3, False, None),
        ({"path": "here", "pretrained": True}, 100, 1e-5, False, None),
    ],
)
def test_the_family_table_fills_in_what_a_spec_leaves_open(
    model: dict[str, Any], epochs: int, learning_rate: float, bos: bool, revision: str | None
) -> None:
    spec = TrialSpec(strings=StringsSpec(length=512), model=ModelSpec(**model))
    assert spec.num_epochs == spec.training.epochs == epochs
    assert spec.training.learning_rate == learning_rate
    assert spec.model.bos is bos
    assert spec.model.revision == revision


def test_what_a_spec_states_is_never_filled_in() -> None:
    stated = TrialSpec(model=ModelSpec(family="opt", bos=False), training=TrainingSpec(epochs=3, learning_rate=0.5))
    assert (stated.num_epochs, stated.training.learning_rate, stated.model.bos) == (3, 0.5, False)


def test_two_specs_made_of_one_part_do_not_share_what_is_filled_in() -> None:
    training = TrainingSpec(schedule="constant")
    assert TrialSpec(training=training).num_epochs == 300
    assert TrialSpec(training=training, model=ModelSpec(size="1b", pretrained=True)).num_epochs == 100
    assert training.epochs is None


@pytest.mark.parametrize(
    ("fields", "precision"),
    [({}, "fp32"), ({"accelerator": "h200"}, "bf16"), ({"accelerator": "h200", "precision": "fp32"}, "fp32")],
)
def test_the_precision_follows_from_the_device_unless_it_is_stated(fields: dict[str, Any], precision: str) -> None:
    assert ComputeSpec(**fields).precision == precision


@pytest.mark.parametrize(
    ("num_strings", "strings_per_step", "steps"), [(1, 1, 1), (8, 1, 8), (8, 4, 2), (8, 0, 1), (8, 8, 1)]
)
def test_an_epoch_has_as_many_steps_as_it_takes_to_see_every_string(
    num_strings: int, strings_per_step: int, steps: int
) -> None:
    spec = TrialSpec(
        strings=StringsSpec(num_strings=num_strings), training=TrainingSpec(strings_per_step=strings_per_step)
    )
    assert spec.steps_per_epoch == steps


# The flattened spec.


def test_params_are_bare_numbers_and_none_where_nothing_applies() -> None:
    params = TrialSpec(strings=StringsSpec(alphabet_size=7, length=256)).params()
    assert params["strings.alphabet_size"] == 7
    assert params["strings.entropy_bits"] == round(math.log2(7), 6)
    assert params["training.learning_rate"] == 0.001
    assert params["model.pretrained"] is False
    assert list(params) == sorted(params)
    assert {name for name, value in params.items() if value == "none"} == {
        "compute.offload", "compute.zero_stage", "model.lora.alpha", "model.lora.dropout", "model.lora.rank",
        "model.lora.target_modules", "model.path", "model.revision", "model.in_context.learning_rate",
        "model.in_context.length", "model.in_context.max_alphabet_size", "model.in_context.strings_per_step",
        "strings.branching", "strings.conditional_entropy_bits", "strings.depth", "strings.motif_length",
        "strings.order", "strings.sha256", "training.frozen_blocks", "training.keep_weights", "training.momentum",
        "training.stop_when.at_least", "training.stop_when.epochs", "training.stop_when.metric",
        "curriculum.num_stages", "curriculum.optimiser", "curriculum.other.alphabet", "curriculum.other.alphabet_size",
        "curriculum.other.entropy_bits", "curriculum.other.skew", "curriculum.other.stages", "curriculum.replay_share",
        "curriculum.revisits", "curriculum.schedule", "curriculum.strings_per_stage", "curriculum.unrepeated",
        "curriculum.weights",
    } | {name for name in params if name.startswith("corpus.")}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "markov"}, {"order": 1, "conditional_entropy_bits": round(math.log2(26), 6), "motif_length": "none"}),
        ({"kind": "markov", "conditional_entropy_bits": 1.5}, {"order": 1, "conditional_entropy_bits": 1.5}),
        ({"kind": "repeated"}, {"motif_length": 64, "depth": "none", "branching": "none", "order": "none"}),
        ({"kind": "hierarchical"}, {"motif_length": 64, "depth": 2, "branching": 4, "alphabet_size": 26}),
        (
            {"kind": "text", "path": __file__},
            {"alphabet": "none", "alphabet_size": "none", "entropy_bits": "none", "skew": "none", "order": "none",
             "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()},
        ),
    ],
)  # fmt: skip
def test_params_hold_what_a_source_reads(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = TrialSpec(strings=StringsSpec(**fields)).params()
    assert {name: params[f"strings.{name}"] for name in expected} == expected


def test_params_of_adapters_criteria_and_skews_are_their_values() -> None:
    params = TrialSpec(
        strings=StringsSpec(entropy_bits=2.0),
        model=ModelSpec(lora=LoraSpec(target_modules=("query_key_value", "dense"))),
        training=TrainingSpec(stop_when=StopWhen(at_least=0.99), optimiser="sgd"),
    ).params()
    assert params.keys() == TrialSpec().params().keys()
    assert params["model.lora.rank"] == 8
    assert params["model.lora.target_modules"] == "query_key_value,dense"
    assert params["training.stop_when.at_least"] == 0.99
    assert (params["strings.entropy_bits"], params["strings.skew"]) == (2.0, "one-token")
    assert (params["training.beta1"], params["training.momentum"]) == ("none", 0.0)


def test_params_hold_every_field_of_what_is_trained() -> None:
    expected = {"string_seed", "model_seed", "order_seed"}
    parts: dict[str, type[Part]] = {"strings": StringsSpec, "model": ModelSpec, "training": TrainingSpec,
             "compute": ComputeSpec, "model.lora": LoraSpec, "model.in_context": InContextSpec,
             "training.stop_when": StopWhen, "curriculum": CurriculumSpec, "curriculum.other": OtherSpec,
             "corpus": CorpusSpec, "corpus.rows": RowsSpec, "corpus.foreign": RowsSpec}  # fmt: skip
    for name, part in parts.items():
        expected |= {f"{name}.{field}" for field in part.model_fields}
    expected -= {"model.lora", "model.in_context", "training.stop_when", "strings.path", "curriculum.other"}
    expected -= {"corpus.rows", "corpus.foreign", "corpus.rows.path", "corpus.foreign.path"}
    expected |= {"curriculum.num_stages"}  # which follows from the rest, and is an axis
    expected -= {*(f"compute.{name}" for name in UNHASHED)}
    assert TrialSpec().params().keys() == expected


def test_params_of_a_corpus_have_the_same_keys_and_nothing_of_strings() -> None:
    corpus = CorpusSpec(rows=RowsSpec(generator="biographies", options={"num_templates": 2}))
    params = TrialSpec(corpus=corpus, model=ModelSpec(size="tiny-text")).params()
    assert params.keys() == TrialSpec().params().keys()
    assert params["corpus.rows.options"] == "num_templates=2"
    assert {value for name, value in params.items() if name.startswith("strings.")} == {"none"}


def test_a_param_that_mlflow_would_refuse_is_shortened_and_stays_distinct() -> None:
    names = tuple(f"gpt_neox.layers.{k}.attention.query_key_value" for k in range(200))
    params = [
        TrialSpec(model=ModelSpec(lora=LoraSpec(target_modules=each))).params()["model.lora.target_modules"]
        for each in (names, names[:-1], names[:-2])
    ]
    assert max(len(str(value)) for value in params) <= 6000
    assert len(set(params)) == 3


# What is refused: each sentence says what must hold, what was found, and what to do.

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too many symbols": (
        {"strings": {"alphabet": "digits", "alphabet_size": 11}},
        ["alphabet 'digits' has 10 symbols", "alphabet_size is 11", "take fewer symbols or another alphabet"],
    ),
    "more vocabulary than the character tokenizer has": (
        {"strings": {"alphabet": "vocabulary", "alphabet_size": 184}},
        ["at most the 183 ordinary tokens of pythia tiny", "alphabet_size is 184", "lower it"],
    ),
    "more vocabulary than a public model has": (
        {"strings": {"alphabet": "vocabulary", "alphabet_size": 60000}, "model": {"size": "70m"}},
        ["at most the 50304 ordinary tokens of pythia 70m", "alphabet_size is 60000", "take another model"],
    ),
    "an entropy that no distribution has": (
        {"strings": {"alphabet_size": 4, "entropy_bits": 2.1}},
        ["0 < entropy_bits <= log2(alphabet_size) must hold", "entropy_bits=2.1", "lower the entropy"],
    ),
    "an entropy of nothing": ({"strings": {"entropy_bits": 0}}, ["0 < entropy_bits", "got entropy_bits=0.0"]),
    "an infinite entropy": ({"strings": {"entropy_bits": math.inf}}, ["finite number"]),
    "dependence of independent symbols": (
        {"strings": {"order": 2}},
        ["order must keep the default under kind='iid'", "got 2", "leave it out, or take kind='markov'"],
    ),
    "a motif of a markov source": (
        {"strings": {"kind": "markov", "motif_length": 8}},
        ["motif_length must keep the default under kind='markov'", "take kind='repeated' or 'hierarchical'"],
    ),
    "levels of one motif": (
        {"strings": {"kind": "repeated", "depth": 1}},
        ["depth must keep the default under kind='repeated'", "take kind='hierarchical'"],
    ),
    "a random alphabet of a text": (
        {"strings": {"kind": "text", "path": __file__, "entropy_bits": 2.0}},
        ["entropy_bits must keep the default under kind='text'", "'iid' or 'markov' or 'repeated' or 'hierarchical'"],
    ),
    "a file of a random source": ({"strings": {"path": __file__}}, ["path must keep the default under kind='iid'"]),
    "a conditional entropy above the marginal's": (
        {"strings": {"kind": "markov", "entropy_bits": 2.0, "conditional_entropy_bits": 3.0}},
        ["0 < conditional_entropy_bits <= entropy_bits must hold", "=3.0 with a marginal of 2.0000 bits", "lower it"],
    ),
    "a conditional entropy of nothing": (
        {"strings": {"kind": "markov", "conditional_entropy_bits": 0}},
        ["0 < conditional_entropy_bits", "got conditional_entropy_bits=0.0"],
    ),
    "dependence on more symbols than there are": (
        {"strings": {"kind": "markov", "order": 64, "length": 64}},
        ["order < length must hold", "got order=64 and length=64", "lower the order or lengthen"],
    ),
    "no order": ({"strings": {"kind": "markov", "order": 0}}, ["greater than 0"]),
    "a motif longer than the string": (
        {"strings": {"kind": "repeated", "length": 32}},
        ["motif_length <= length must hold", "got motif_length=64 and length=32", "shorten the motif"],
    ),
    "a motif of one symbol": ({"strings": {"kind": "repeated", "motif_length": 1}}, ["greater than or equal to 2"]),
    "no levels": (
        {"strings": {"kind": "hierarchical", "depth": 0}},
        ["depth >= 1 must hold", "one motif over and over is kind='repeated'"],
    ),
    "parts of which none is repeated": ({"strings": {"kind": "hierarchical", "branching": 2}}, ["equal to 3"]),
    "a hierarchy that the string does not reach": (
        {"strings": {"kind": "hierarchical", "motif_length": 16, "branching": 4, "depth": 2, "length": 128}},
        ["2 * motif_length * branching**(depth - 1) < length must hold", "got 128 and length=128", "lower one of them"],
    ),
    "a text without a file": ({"strings": {"kind": "text"}}, ["needs a text", "got path=None", "set strings.path"]),
    "a text that is not there": (
        {"strings": {"kind": "text", "path": "nowhere.txt"}},
        ["must be a text file in UTF-8 wherever a trial runs", "nowhere.txt", "No such file", "correct the path"],
    ),
    "a digest that is none": ({"strings": {"kind": "text", "path": __file__, "sha256": "abc"}}, ["match pattern"]),
    "an unknown source": ({"strings": {"kind": "random"}}, ["'iid', 'markov', 'repeated', 'hierarchical' or 'text'"]),
    "an unknown family": (
        {"model": {"family": "pythai"}},
        [
            "unknown model family 'pythai'; did you mean 'pythia'? families: gpt2, llama2, "
            "llama3, mistral, opt, phi, pythia"
        ],
    ),
    "an unknown size": (
        {"model": {"size": "1.4B"}},
        ["unknown size of pythia '1.4B'", "did you mean '1.4b'?", "sizes: tiny"],
    ),
    "published weights of a size without any": (
        {"model": {"pretrained": True}},
        ["has no published weights", "pretrained=True", "name a public size or a path"],
    ),
    "a revision of a size without a repository": (
        {"model": {"revision": "step1000"}},
        ["has no published weights", "revision='step1000'", "name a public size or a path"],
    ),
    "a revision of a directory": (
        {"model": {"path": "here", "revision": "step1000"}},
        ["a revision belongs to the hub", "path='here'", "leave out revision or path"],
    ),
    "adapters of nothing": ({"model": {"lora": {"target_modules": []}}}, ["at least 1 item"]),
    "a dropout of everything": ({"model": {"dropout": 1.0}}, ["less than 1"]),
    "an unread setting of the other optimiser": (
        {"training": {"momentum": 0.9}},
        ["momentum must keep the default under optimiser='adamw'", "leave it out, or take optimiser='sgd'"],
    ),
    "unread settings of AdamW": (
        {"training": {"optimiser": "sgd", "beta1": 0.8, "eps": 1e-6}},
        ["beta1, eps must keep the default under optimiser='sgd'", "take optimiser='adamw'"],
    ),
    "a criterion on what held-out strings decide": (
        {"training": {"stop_when": {"metric": "recall/robust"}}},
        ["'recall/token_accuracy', 'recall/corrected_accuracy'"],
    ),
    "an unknown accelerator": (
        {"compute": {"accelerator": "h100"}},
        ["unknown accelerator 'h100'", "did you mean 'h200'?", "a100-80gb"],
    ),
    "more than one device a trial": ({"compute": {"device_share": 2}}, ["less than or equal to 1"]),
    "an unknown engine": ({"compute": {"engine": "jax"}}, ["'torch' or 'deepspeed'", "jax"]),
    "no workers": ({"compute": {"engine": "deepspeed", "workers": 0}}, ["greater than 0"]),
    "a stage that ZeRO has not": ({"compute": {"engine": "deepspeed", "zero_stage": 4}}, ["0, 1, 2 or 3"]),
    "workers of plain torch": (
        {"compute": {"workers": 2}},
        ["engine 'torch' runs on one device", "got workers=2", "set compute.engine='deepspeed', or leave them out"],
    ),
    "shards of plain torch": (
        {"compute": {"engine": "torch", "zero_stage": 1, "offload": "optimiser"}},
        ["got zero_stage=1, offload='optimiser'", "set compute.engine='deepspeed'"],
    ),
    "offloaded state of an optimiser that is not sharded": (
        {"compute": {"engine": "deepspeed", "offload": "optimiser"}},
        ["offload='optimiser' needs at least zero_stage=1, but got zero_stage=0", "raise the stage"],
    ),
    "offloaded weights that are not sharded": (
        {"compute": {"engine": "deepspeed", "zero_stage": 2, "offload": "parameters"}},
        ["offload='parameters' needs at least zero_stage=3, but got zero_stage=2"],
    ),
    "a worker on a part of a device": (
        {"compute": {"engine": "deepspeed", "device_share": 0.5}},
        ["takes a whole device, but got device_share=0.5", "leave it out"],
    ),
    "strings that cannot be shared out": (
        {
            "strings": {"num_strings": 4},
            "training": {"strings_per_step": 0},
            "compute": {"engine": "deepspeed", "workers": 3},
        },
        ["must be a multiple of compute.workers, or fewer", "got 4 strings a step and 3 workers", "change training"],
    ),
    "a forward pass that does not divide a worker's share": (
        {
            "strings": {"num_strings": 8},
            "training": {"strings_per_step": 0, "strings_per_forward": 8},
            "compute": {"engine": "deepspeed", "workers": 2},
        },
        ["must divide the 4 strings that a worker has in a step", "got 8"],
    ),
    "probe epochs out of order": ({"probes": {"epochs": [3, 1]}}, ["must ascend without repetition", "[3, 1]"]),
    "probe epochs twice": ({"probes": {"epochs": [1, 1]}}, ["must ascend without repetition"]),
    "more compared strings than there are": (
        {"probes": {"compared_strings": 2}},
        ["at most strings.num_strings", "2 > 1", "compare fewer strings"],
    ),
    "a string beyond the context": (
        {"strings": {"length": 2049}},
        ["reads at most 2048 tokens", "strings.length=2049", "needs 2049", "shorten the strings"],
    ),
    "a BOS beyond the context": (
        {"strings": {"length": 2048}, "model": {"bos": True}},
        ["reads at most 2048 tokens", "bos=True needs 2049"],
    ),
    "a step that does not divide the strings": (
        {"strings": {"num_strings": 8}, "training": {"strings_per_step": 3}},
        ["strings_per_step must divide strings.num_strings", "got 3 and 8", "take a divisor, or 0"],
    ),
    "a step of more strings than there are": (
        {"training": {"strings_per_step": 2}},
        ["strings_per_step must divide strings.num_strings", "got 2 and 1"],
    ),
    "a forward pass that does not divide the step": (
        {"strings": {"num_strings": 8}, "training": {"strings_per_step": 4, "strings_per_forward": 3}},
        ["strings_per_forward must divide the 4 strings that a worker has in a step", "got 3", "take a divisor, or 0"],
    ),
    "a seed beyond 32 bits": ({"string_seed": 2**32}, ["less than 4294967296"]),
    "a negative seed": ({"order_seed": -1}, ["greater than or equal to 0"]),
    "a string of one symbol": ({"strings": {"length": 1}}, ["greater than or equal to 2"]),
    "an unknown part": ({"string": {"length": 64}}, ["Extra inputs are not permitted"]),
    "an unknown field": ({"strings": {"len": 64}}, ["Extra inputs are not permitted"]),
    "an unknown field of adapters": ({"model": {"lora": {"r": 8}}}, ["Extra inputs are not permitted"]),
    "an unknown field of a criterion": ({"training": {"stop_when": {"above": 1}}}, ["Extra inputs are not permitted"]),
    "an unknown field of the probes": ({"probes": {"epoch": 1}}, ["Extra inputs are not permitted"]),
    "an unknown field of the device": ({"compute": {"device": "cpu"}}, ["Extra inputs are not permitted"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_spec_that_cannot_be_is_refused_with_a_sentence(what: str) -> None:
    fields, sentences = REFUSED[what]
    with pytest.raises(ValidationError) as caught:
        TrialSpec(**fields)
    for sentence in sentences:
        assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("strings_per_step", "workers", "share"), [(0, 1, 8), (0, 4, 2), (0, 8, 1), (0, 9, 8), (2, 2, 1), (2, 3, 2)]
)
def test_a_step_is_shared_out_or_repeated_by_every_worker(strings_per_step: int, workers: int, share: int) -> None:
    spec = TrialSpec(
        strings=StringsSpec(num_strings=8),
        training=TrainingSpec(strings_per_step=strings_per_step),
        compute=ComputeSpec(engine="deepspeed", workers=workers),
    )
    assert spec.strings_per_worker == share


def test_the_longest_strings_that_fit_are_allowed() -> None:
    assert TrialSpec(strings=StringsSpec(length=2048)).strings.length == 2048
    assert TrialSpec(strings=StringsSpec(length=2047), model=ModelSpec(bos=True)).model.bos
    largest = TrialSpec(strings=StringsSpec(length=4095), model=ModelSpec(family="llama2", size="7b"))
    assert largest.strings.length + 1 == 4096
    assert TrialSpec(strings=StringsSpec(alphabet="vocabulary", alphabet_size=183)).strings.alphabet_size == 183
    by_path = TrialSpec(strings=StringsSpec(length=9999), model=ModelSpec(path="its config tells, when it is loaded"))
    assert by_path.strings.length == 9999
