"""Bad input dies in `plan`, on a laptop, with exit code 2 and a sentence that says what to change."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memray.cli import app

HEAD = '''"""A question?"""

from memray.curriculum import OtherSpec
from memray.probes import ContextSpec
from memray.spec import *
from memray.sweep import *

'''

# (the body of a study, what its refusal must say)
BAD_STUDIES = {
    "an unknown family": ("model=ModelSpec(family='pythai')", "did you mean 'pythia'? families: gpt2, llama2, llama3, mistral, opt, phi, pythia"),
    "an unknown size": ("model=ModelSpec(size='7b')", "unknown size of pythia '7b'"),
    "an entropy above log2 of the alphabet": ("strings=StringsSpec(alphabet_size=4, entropy_bits=2.5)", "log2 = 2.0"),
    "no entropy at all": ("strings=StringsSpec(entropy_bits=0.0)", "0 < entropy_bits <= log2(alphabet_size) must hold"),
    "an alphabet of one symbol": ("strings=StringsSpec(alphabet_size=1)", "greater than or equal to 2, but got 1"),
    "more symbols than the alphabet has": ("strings=StringsSpec(alphabet='digits', alphabet_size=26)", "has 10 symbols"),
    "an unknown alphabet": ("strings=StringsSpec(alphabet='runes')", "'latin', 'latin_upper', 'digits'"),
    "a string longer than the context": ("strings=StringsSpec(length=4096)", "reads at most 2048 tokens"),
    "a BOS that no longer fits": ("model=ModelSpec(family='gpt2', size='124m', bos=True)", "needs 1025"),
    "an unknown field": ("training=TrainingSpec(epoch=3)", "study.py: epoch: no such field"),
    "a conditional entropy of independent symbols": (
        "strings=StringsSpec(conditional_entropy_bits=1.0)", "leave it out, or take kind='markov'"),
    "a conditional entropy above the marginal's": (
        "strings=StringsSpec(kind='markov', entropy_bits=1.0, conditional_entropy_bits=2.0)",
        "0 < conditional_entropy_bits <= entropy_bits must hold"),
    "an order beyond the string": (
        "strings=StringsSpec(kind='markov', order=64, length=64)", "lower the order or lengthen the strings"),
    "a motif longer than the string": (
        "strings=StringsSpec(kind='repeated', length=32)", "shorten the motif or lengthen the strings"),
    "a hierarchy without levels": ("strings=StringsSpec(kind='hierarchical', depth=0)", "one motif over and over is kind='repeated'"),
    "a hierarchy beyond the string": (
        "strings=StringsSpec(kind='hierarchical', length=256)", "the highest level repeats nothing, but got 512 and length=256"),
    "a text without a file": ("strings=StringsSpec(kind='text')", "set strings.path"),
    "a text that is not there": ("strings=StringsSpec(kind='text', path='nowhere.txt')", "must be a text file in UTF-8"),
    "a text that is another one": (
        "strings=StringsSpec(kind='text', path=__file__, sha256='0' * 64)", "must hold the text that the spec was made from"),
    "a text with a source's alphabet": (
        "strings=StringsSpec(kind='text', path=__file__, alphabet='greek')", "alphabet must keep the default under kind='text'"),
    "frozen blocks that are not there": ("training=TrainingSpec(frozen_blocks=(7,))", "among the blocks 0 to 3"),
    "a context probe at no probe epoch": (
        "probes=ProbesSpec(epochs=(0,), context=ContextSpec(epochs=(5,)))", "must be among probes.epochs, but [5]"),
    "a text that is too short": (
        "strings=StringsSpec(kind='text', path=__file__)", "at least 11264 tokens, 1024 for each of 11 trained and held-out strings"),
    "an unknown skew": ("strings=StringsSpec(entropy_bits=1.0, skew='one_token')", "'one-token', 'geometric' or 'zipf'"),
    "no epochs": ("training=TrainingSpec(epochs=0)", "greater than 0, but got 0"),
    "a negative rate": ("training=TrainingSpec(learning_rate=-1e-3)", "greater than 0, but got -0.001"),
    "a step that does not divide the strings": (
        "strings=StringsSpec(num_strings=4), training=TrainingSpec(strings_per_step=3)", "must divide strings.num_strings"),
    "a forward pass that does not divide the step": (
        "strings=StringsSpec(num_strings=4), training=TrainingSpec(strings_per_step=4, strings_per_forward=3)", "take a divisor"),
    "published weights of a size that has none": ("model=ModelSpec(pretrained=True)", "has no published weights"),
    "a criterion that the held-out strings would decide": (
        "training=TrainingSpec(stop_when={'metric': 'recall/robust'})", "'recall/token_accuracy'"),
    "an unknown accelerator": ("compute=ComputeSpec(accelerator='h20')", "did you mean 'h200'?"),
    "a model that cannot fit": (
        "model=ModelSpec(size='12b'), compute=ComputeSpec(accelerator='t4')", "a trial must fit its device"),
    "an unknown engine": ("compute=ComputeSpec(engine='jax')", "'torch' or 'deepspeed'"),
    "no workers": ("compute=ComputeSpec(engine='deepspeed', workers=0)", "greater than 0, but got 0"),
    "workers of plain torch": ("compute=ComputeSpec(workers=2)", "set compute.engine='deepspeed', or leave them out"),
    "shards of plain torch": ("compute=ComputeSpec(engine='torch', zero_stage=2)", "shards nothing, but got zero_stage=2"),
    "offload without its stage": (
        "compute=ComputeSpec(engine='deepspeed', zero_stage=2, offload='parameters')", "needs at least zero_stage=3"),
    "a worker on a part of a device": (
        "compute=ComputeSpec(engine='deepspeed', device_share=0.5)", "takes a whole device, but got device_share=0.5"),
    "strings that cannot be shared out": (
        "strings=StringsSpec(num_strings=4), training=TrainingSpec(strings_per_step=0), compute=ComputeSpec(engine='deepspeed', workers=3)",
        "multiple of compute.workers, or fewer than they are, but got 4 strings a step and 3 workers"),
    "a forward pass that does not divide a worker's share": (
        "strings=StringsSpec(num_strings=8), training=TrainingSpec(strings_per_step=0, strings_per_forward=8), "
        "compute=ComputeSpec(engine='deepspeed', workers=2)", "must divide the 4 strings that a worker has in a step"),
    "a named engine that cannot hold the model": (
        "model=ModelSpec(size='12b'), compute=ComputeSpec(accelerator='t4', engine='torch')", "a trial must fit its device"),
    "what fits nowhere": (
        "model=ModelSpec(family='opt', size='13b'), strings=StringsSpec(length=2047), compute=ComputeSpec(accelerator='t4')", "a trial must fit its device"),
    "a directory that holds no model": ("model=ModelSpec(path='nowhere')", "must be a directory written by save_pretrained"),
    "more compared strings than there are": ("probes=ProbesSpec(compared_strings=2)", "compare fewer strings"),
    "strings that do not fill the stages": (
        "strings=StringsSpec(num_strings=10), curriculum=CurriculumSpec(strings_per_stage=4)",
        "curriculum.strings_per_stage must divide strings.num_strings"),
    "a stage that is visited again and is not there": (
        "strings=StringsSpec(num_strings=4), curriculum=CurriculumSpec(revisits=(4,))", "among the stages 0 to 3, but got [4]"),
    "a past that base weights do not have": (
        "strings=StringsSpec(num_strings=4), curriculum=CurriculumSpec(weights='base', replay_share=0.5)",
        "begins every stage without a past, but got replay_share"),
    "a share above the whole": ("curriculum=CurriculumSpec(replay_share=1.5)", "less than or equal to 1, but got 1.5"),
    "stages with another source that changes nothing": (
        "curriculum=CurriculumSpec(other=OtherSpec(stages=(0,)))", "must change something about the strings"),
    "other stages with more symbols than their alphabet": (
        "curriculum=CurriculumSpec(other=OtherSpec(stages=(0,), alphabet='digits', alphabet_size=26))", "has 10 symbols"),
    "a visit to a stage that had no strings of its own": (
        "strings=StringsSpec(num_strings=4), curriculum=CurriculumSpec(unrepeated=(1,), revisits=(1,))", "leave them out of one of the two"),
    "fresh strings of a text": (
        "strings=StringsSpec(kind='text', path=__file__), curriculum=CurriculumSpec(unrepeated=(0,))", "a source that never runs out"),
    "a sequence without held-out strings": (
        "curriculum=CurriculumSpec(), probes=ProbesSpec(num_held_out=0)", "must go without probes.num_held_out=0"),
    "a context probe of a sequence": (
        "curriculum=CurriculumSpec(), probes=ProbesSpec(context=ContextSpec())", "must go without probes.context"),
    "ages without stages": ("probes=ProbesSpec(retention=RetentionSpec(ages=(1,)))", "but the trial has no curriculum"),
    "ages out of order": (
        "curriculum=CurriculumSpec(), probes=ProbesSpec(retention=RetentionSpec(ages=(3, 1)))", "ages of probes.retention must ascend"),
    "probe epochs out of order": ("probes=ProbesSpec(epochs=(3, 1))", "must ascend"),
}  # fmt: skip


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def study(folder: Path, text: str) -> str:
    path = folder / "study.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("what", BAD_STUDIES)
def test_a_bad_spec_dies_in_plan_with_a_sentence(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, sentence = BAD_STUDIES[what]
    monkeypatch.chdir(tmp_path)
    path = study(tmp_path, HEAD + f"def sweep(*, scale='tiny', seeds=1):\n    return Sweep([TrialSpec({fields})])\n")
    done = run("plan", path)
    assert done.exit_code == 2, done.output
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_symbols_that_split_die_in_plan(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from memray.models import load_model
    from memray.spec import ModelSpec

    # A byte-level tokenizer that has merged nothing: every Greek letter is two bytes and two tokens.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, special_tokens=[])
    tokenizer.train_from_iterator(["abc"], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    load_model(ModelSpec(), seed=0).save_pretrained(tmp_path / "model")
    spec = f"TrialSpec(model=ModelSpec(path={str(tmp_path / 'model')!r}), strings=StringsSpec(alphabet=a, alphabet_size=3, length=64))"
    path = study(
        tmp_path,
        HEAD + f"def sweep(*, scale='tiny', seeds=1):\n    return Sweep([{spec} for a in ('latin', 'greek')])\n",
    )
    done = run("plan", path)
    assert done.exit_code == 2
    assert "1 of 2 trials of study cannot run" in done.stderr
    for symbol in "αβγ":
        assert f"'{symbol}' splits into 2 tokens" in done.stderr


def test_a_plan_says_what_is_left_out_of_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("two words " * 100)
    strings = "StringsSpec(kind='text', path='text', length=64)"
    path = study(
        tmp_path, HEAD + f"def sweep(*, scale='tiny', seeds=1):\n    return Sweep([TrialSpec(strings={strings})])\n"
    )
    done = run("plan", path)
    assert done.exit_code == 0, done.output
    assert f"200 of the 1000 tokens of {tmp_path / 'text'} are special or unknown to pythia tiny" in done.stderr


def test_a_text_too_short_for_the_context_probe_of_one_cell_dies_in_plan(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 40)  # five strings of 64
    body = (
        "def sweep(*, scale='tiny', seeds=1):\n"
        f"    strings = StringsSpec(kind='text', path={str(tmp_path / 'text')!r}, length=64)\n"
        "    base = TrialSpec(strings=strings, probes=ProbesSpec(num_held_out=1))\n"
        "    probed = {'training.learning_rate': 1e-4, 'probes.context': ContextSpec()}\n"
        "    return Sweep(vary(base, changes) for changes in ({}, probed))\n"
    )
    path = study(tmp_path, HEAD + body)
    done = run("plan", path, "--storage", str(tmp_path))
    assert done.exit_code == 2
    assert "1 of 2 trials of study cannot run" in done.stderr
    assert "at least 448 tokens, 64 for each of 7 trained and held-out strings" in done.stderr


def test_all_invalid_cells_are_reported_together(tmp_path: Path) -> None:
    path = study(tmp_path, HEAD + (
        "def sweep(*, scale='tiny', seeds=1):\n"
        "    return Sweep(vary(TrialSpec(), {'strings.alphabet_size': size}) for size in (1, 2, 27, 26, 30))\n"))  # fmt: skip
    done = run("plan", path)
    assert done.exit_code == 2
    assert "3 of 5 cells are invalid" in done.stderr
    assert [f"'strings.alphabet_size': {size}}}" in done.stderr for size in (1, 2, 27, 26, 30)] == [
        True,
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1\n", "must define a function `sweep(...) -> Sweep`"),
        ("def sweep():\n    return 3\n", "must return a Sweep, but it returned int"),
        ("def sweep():\n    return Sweep([])\n", "at least one trial"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    done = run("plan", study(tmp_path, HEAD + text))
    assert done.exit_code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-p", "size=3"], "has no parameter 'size'; parameters: scale, seeds, alphabet_sizes, family"),
        (["-p", "seeds=many"], "parameter seeds"),
        (["-p", "scale=huge"], "'paper' or 'tiny'"),
        (["-p", "seeds"], "-p takes name=value"),
    ],
)
def test_a_bad_parameter_is_refused(arguments: list[str], sentence: str) -> None:
    done = run("plan", "sweeps/alphabet.py", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_missing_file_is_refused() -> None:
    done = run("plan", "sweeps/nothing.py")
    assert done.exit_code == 2
    assert "sweeps/alphabet.py" in done.stderr


def test_a_plan_as_json_has_one_object_a_trial(tmp_path: Path) -> None:
    done = run("plan", "sweeps/alphabet.py", "-p", "seeds=2", "--json", "--storage", str(tmp_path))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0
    assert len({row["trial_id"] for row in rows}) == 10
    assert {row["state"] for row in rows} == {"planned"}
    assert all(row["flops"] > 0 and row["peak_gib"] > 0 and row["device_hours"] > 0 for row in rows)


def test_a_plan_warns_where_trials_side_by_side_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = "TrialSpec(strings=StringsSpec(length=1000, num_strings=64), training=TrainingSpec(strings_per_step=64))"
    sweep = f"    return Sweep(vary({large}, {{'string_seed': seed}}) for seed in range(100))\n"
    path = study(tmp_path, f"{HEAD}def sweep(*, scale='tiny', seeds=1):\n{sweep}")
    plan = ["plan", path, "--storage", str(tmp_path / "runs")]
    for cores, warns in ((1, False), (100, True)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        said = run(*plan).stdout
        assert ("Ray would end some of them. Run fewer with --max-concurrent" in said) == warns, said


def test_a_plan_totals_what_is_left(tmp_path: Path) -> None:
    done = run("plan", "sweeps/alphabet.py", "-p", "seeds=2", "--storage", str(tmp_path))
    assert done.exit_code == 0
    assert "10 trials in 5 cells, 10 to run" in done.stdout


def test_an_unknown_trial_is_refused() -> None:
    done = run("trial", "sweeps/alphabet.py", "ffffffffffff")
    assert done.exit_code == 2
    assert "`plan` lists the ids" in done.stderr


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("strings=StringsSpec(length=4096)", "reads at most 2048 tokens, but a string of this trial has 4096"),
        ("strings=StringsSpec(length=64)", "weights must be stored as safetensors"),
    ],
)
def test_what_a_directory_cannot_do_dies_in_plan(fields: str, sentence: str, tmp_path: Path) -> None:
    from memray.models import character_tokenizer, load_model
    from memray.spec import ModelSpec

    load_model(ModelSpec(), seed=0).config.save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    spec = f"TrialSpec(model=ModelSpec(path={str(tmp_path / 'model')!r}, pretrained=True), {fields})"
    done = run("plan", study(tmp_path, HEAD + f"def sweep(*, scale='tiny', seeds=1):\n    return Sweep([{spec}])\n"))
    assert done.exit_code == 2
    assert sentence in done.stderr


# Corpora.

QUESTIONS = "corpus=CorpusSpec(rows=RowsSpec(generator='questions'), num_samples=8), model=ModelSpec(size='tiny-text')"


def corpus_study(folder: Path, probes: str) -> str:
    head = HEAD + "from memray.corpora import CorpusSpec, RowsSpec\nfrom memray.probes import EmbeddingsSpec\n\n"
    spec = f"TrialSpec({QUESTIONS}, training=TrainingSpec(epochs=1), probes=ProbesSpec(epochs=(0,), {probes}))"
    trials = f"{spec}, vary({spec}, {{'string_seed': 1}})"
    return study(folder, head + f"def sweep(*, scale='tiny', seeds=1):\n    return Sweep([{trials}])\n")


@pytest.mark.parametrize(
    ("probes", "sentence"),
    [
        ("embeddings=EmbeddingsSpec(encoder='/nowhere/at/all')", "'/nowhere/at/all' is no directory; mend it"),
        (
            "prefix_lengths=(0, 64)",
            "a reference must go on beyond the most of probes.prefix_lengths, 64, but the longest",
        ),
    ],
)
def test_what_would_say_nothing_of_any_sample_dies_in_plan(probes: str, sentence: str, tmp_path: Path) -> None:
    done = run("plan", corpus_study(tmp_path, probes), "--storage", str(tmp_path / "runs"))
    assert done.exit_code == 2, done.output
    assert "2 of 2 trials of study cannot run" in done.stderr
    assert done.stderr.count(sentence) == 2
    assert not (tmp_path / "runs").exists()


def test_prefix_lengths_that_leave_a_token_of_one_reference_are_planned_and_said_of_each_probe(tmp_path: Path) -> None:
    from memray.samples import NATIVE, prepare_samples
    from memray.sweep import load

    known = [prepare_samples(trial).known for trial in load(corpus_study(tmp_path, "")).trials]
    lengths = [max(len(each.reference_ids) for each in samples if each.role == NATIVE) for samples in known]
    shortest = min(lengths)
    done = run("plan", corpus_study(tmp_path, f"prefix_lengths=(0, {shortest - 1})"), "--storage", str(tmp_path))
    assert done.exit_code == 0, done.output
    done = run("plan", corpus_study(tmp_path, f"prefix_lengths=(0, {max(lengths)})"), "--storage", str(tmp_path))
    assert done.exit_code == 2
    # Trials of one corpus that are looked at in two ways are checked apart.
    text = Path(corpus_study(tmp_path, "prefix_lengths=(0,)")).read_text()
    text = text.replace("'string_seed': 1", f"'order_seed': 1, 'probes.prefix_lengths': (0, {max(lengths)})")
    done = run("plan", study(tmp_path, text), "--storage", str(tmp_path))
    assert "1 of 2 trials of study cannot run" in done.stderr


def test_a_plan_says_that_samples_are_taken_at_their_longest(tmp_path: Path) -> None:
    done = run("plan", corpus_study(tmp_path, ""), "--storage", str(tmp_path))
    assert done.exit_code == 0, done.output
    said = (
        "Costs are those of samples of corpus.max_tokens each, the longest that there can be; shorter ones take less."
    )
    assert said in " ".join(done.stdout.split())
    of_strings = run("plan", "sweeps/demo.py", "-p", "seeds=1", "--storage", str(tmp_path))
    assert "corpus.max_tokens" not in of_strings.stdout


def test_an_encoder_of_the_hub_is_fetched_once_and_then_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network here: what stands for the hub puts into its cache what a download would."""
    from huggingface_hub import constants

    from memray.preflight import download
    from memray.sweep import SweepError, load
    from memray.trial import run_trial

    from .test_embedding import save_encoder

    cache, fetched = tmp_path / "hub" / "models--owner--name", []

    def fetch(where: str, **options: object) -> None:
        fetched.append(where)
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / "main").write_text("0" * 40)
        save_encoder(cache / "snapshots" / ("0" * 40))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = corpus_study(tmp_path, "embeddings=EmbeddingsSpec(encoder='owner/name')")
    planned = run("plan", path, "--storage", str(tmp_path))
    assert planned.exit_code == 0, planned.output
    assert planned.stderr.count("the sentence encoder owner/name is not downloaded yet") == 1
    sweep = load(path)
    with pytest.raises(ValueError, match=r"but 'owner/name' cannot be fetched: .*; mend it, or leave it out"):
        download(sweep)
    monkeypatch.setattr("memray.models.snapshot_download", fetch)
    assert [download(sweep), download(sweep), fetched] == [["owner/name"], [], ["owner/name"]]
    assert "encoder" not in run("plan", path, "--storage", str(tmp_path)).stderr
    assert "similarity/full" in next(iter(run_trial(sweep.trials[0]))).metrics
    (cache / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    monkeypatch.setattr("memray.models.snapshot_download", lambda where, **options: None)
    with pytest.raises(SweepError, match=r"2 of 2 trials .*\n.*'owner/name' has no model.safetensors"):
        download(sweep)
