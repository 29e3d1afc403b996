"""Tiny models of every family: seeds, directories, dropout, adapters, and what is refused. No network."""

import http.server
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import constants
from hypothesis import given
from hypothesis.strategies import text
from transformers import PreTrainedModel

from memray.families import FAMILIES
from memray.models import character_tokenizer, check_context, load_model, load_tokenizer, text_tokenizer
from memray.spec import LoraSpec, ModelSpec
from memray.strings import ALPHABETS

each_family = pytest.mark.parametrize("family", FAMILIES)

TEXT = torch.arange(4, 30)[None]
GOLDEN_PIECES = [279, 1068, 426, 361, 721, 1480, 432, 382, 368, 566]


def tiny(family: str = "pythia", **fields: object) -> ModelSpec:
    return ModelSpec.model_validate(fields | {"family": family})


def saved(family: str, directory: Path) -> Path:
    """A directory as a user would have it: a tiny model and its tokenizer, in fp32."""
    load_model(tiny(family), seed=0).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def equal_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TEXT).logits


# Tokenizers that need no download.


@given(text())
def test_every_text_is_pieces_and_reads_as_itself_again(words: str):
    tokenizer = text_tokenizer()
    ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {*ids} & {*tokenizer.all_special_ids}
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == words


def test_the_pieces_never_change():
    ids = text_tokenizer()("an entity that has physical existence", add_special_tokens=False)["input_ids"]
    assert ids == GOLDEN_PIECES


# Tiny models and their seeds.


@each_family
@pytest.mark.parametrize("name", ["tiny", "tiny-text"])
def test_a_tiny_model_has_the_familys_own_class_and_the_tables_shape(family: str, name: str):
    spec = ModelSpec(family=family, size=name)
    model = load_model(spec, seed=0)
    size = FAMILIES[family].sizes[name]
    assert type(model.config).__name__ == FAMILIES[family].config_class
    assert model.num_parameters() == size.num_parameters
    assert logits(model).shape[-1] == size.vocab_size == len(load_tokenizer(spec))
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert not model.training


@each_family
def test_equal_seeds_give_equal_weights_and_different_seeds_different_ones(family: str):
    model = load_model(tiny(family), seed=3)
    assert equal_weights(model, load_model(tiny(family), seed=3))
    assert not torch.equal(logits(model), logits(load_model(tiny(family), seed=4)))


@each_family
def test_an_untrained_model_predicts_nearly_uniformly(family: str):
    nll = torch.nn.functional.cross_entropy(logits(load_model(tiny(family), seed=0))[0, :-1], TEXT[0, 1:])
    # Logits of standard deviation d raise the loss by d^2 / 2: well below 0.1 nats at initialisation.
    assert float(nll) == pytest.approx(np.log(187), abs=0.1)


def generator_states() -> list[object]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[union-attr]


@pytest.mark.parametrize("fields", [{}, {"lora": {}}, {"pretrained": True}], ids=["untrained", "lora", "pretrained"])
def test_no_global_random_state_is_touched_or_read(fields: dict[str, object], tmp_path: Path):
    spec = ModelSpec.model_validate(fields | {"path": str(saved("pythia", tmp_path))})
    torch.manual_seed(1)
    before = generator_states()
    model = load_model(spec, seed=0)
    assert generator_states() == before
    torch.manual_seed(2)
    assert equal_weights(model, load_model(spec, seed=0))


def test_a_lower_precision_rounds_the_same_draw_and_leaves_the_rotary_frequencies_alone():
    full, half = (load_model(tiny(), seed=0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, weight in full.named_parameters():
        assert torch.equal(weight.to(torch.bfloat16), half.get_parameter(name))
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}


# Directories.


@each_family
def test_a_saved_model_is_loaded_by_path_with_equal_weights(family: str, tmp_path: Path):
    path = str(saved(family, tmp_path))
    loaded = load_model(tiny(family, path=path, pretrained=True), seed=9)
    assert equal_weights(loaded, load_model(tiny(family), seed=0))
    assert load_tokenizer(tiny(family, path=path)).get_vocab() == character_tokenizer().get_vocab()


def test_an_untrained_model_of_a_directory_has_its_config_and_not_its_weights(tmp_path: Path):
    # The directory says which model: the family is but a label.
    path = str(saved("llama2", tmp_path))
    untrained = load_model(tiny("pythia", path=path), seed=1)
    assert equal_weights(untrained, load_model(tiny("llama2"), seed=1))


def test_pickled_weights_are_refused(tmp_path: Path):
    path = saved("pythia", tmp_path)
    torch.save(safetensors.torch.load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weights must be stored as safetensors") as raised:
        load_model(tiny(path=str(path), pretrained=True), seed=0)
    assert "weight files found: pytorch_model.bin; convert the model" in str(raised.value)
    load_model(tiny(path=str(path)), seed=0)  # untrained, only the config is read


def test_weights_that_the_checkpoint_lacks_are_named_and_not_drawn_at_random(tmp_path: Path):
    path = saved("pythia", tmp_path)
    weights = safetensors.torch.load_file(path / "model.safetensors")
    del weights["embed_out.weight"]
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of them \(\w+\.weight\), which would start at random"):
        load_model(tiny(path=str(path), pretrained=True), seed=0)


def test_code_in_a_directory_is_never_run(tmp_path: Path):
    path = saved("pythia", tmp_path)
    (path / "trap.py").write_text("raise SystemExit('the trap was run')")
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a model must be readable"):
        load_model(tiny(path=str(path), pretrained=True), seed=0)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_path_that_is_no_directory_is_refused_and_not_taken_for_a_hub_repository(pretrained: bool):
    spec = tiny(path="somebody/some-model", pretrained=pretrained)
    for load in (lambda: load_model(spec, seed=0), lambda: load_tokenizer(spec)):
        with pytest.raises(ValueError, match=r"model\.path must be a directory .* but 'somebody/some-model' is none"):
            load()


@each_family
def test_a_directory_without_a_tokenizer_is_refused(family: str, tmp_path: Path):
    load_model(tiny(family), seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must come with its tokenizer|a model must be readable .* and tokenizer"):
        load_tokenizer(tiny(family, path=str(tmp_path)))


def test_published_weights_of_a_tiny_size_are_refused():
    # Past the spec's own check, which refuses this already.
    spec = tiny().model_copy(update={"pretrained": True})
    with pytest.raises(ValueError, match=r"size 'tiny' of pythia has none; set model\.path.*: 14m, 31m, 70m, "):
        load_model(spec, seed=0)


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = ModelSpec(family="gpt2", size="1.5b", pretrained=True)
    for load in (lambda: load_model(spec, seed=0), lambda: load_tokenizer(spec)):
        with pytest.raises(ValueError, match=r"reading 'openai-community/gpt2-xl' at revision '15ea56de\w+' failed"):
            load()


# Context.


def test_a_string_longer_than_the_context_is_refused():
    model = load_model(tiny("gpt2"), seed=0)
    check_context(model, 2048)
    with pytest.raises(ValueError, match="must fit into the 2048 positions of the model, but it takes 2049 tokens"):
        check_context(model, 2049)


# Dropout.


@pytest.mark.parametrize(("dropout", "repeats"), [(0.0, True), (0.5, False)])
@each_family
def test_the_spec_decides_every_dropout_whatever_the_config_says(
    family: str, dropout: float, repeats: bool, tmp_path: Path
):
    path = saved(family, tmp_path)
    config = transformers.AutoConfig.from_pretrained(path)
    fields = [name for name in config.to_dict() if "dropout" in name or "pdrop" in name]
    for name in [*fields, *(["layerdrop"] if family == "opt" else [])]:
        setattr(config, name, 0.3)
    config.save_pretrained(path)
    model = load_model(tiny(family, path=str(path), pretrained=True, dropout=dropout), seed=0).train()
    assert {getattr(model.config, name) for name in fields} == {dropout}
    assert getattr(model.config, "layerdrop", 0) == 0
    assert torch.equal(logits(model), logits(model)) is repeats


# Adapters.


@each_family
def test_only_the_adapters_of_lora_learn(family: str):
    base = load_model(tiny(family), seed=0)
    model = load_model(tiny(family, lora={"rank": 4}), seed=0).train()
    assert torch.equal(logits(model), logits(base)), "an adapter must start as the identity"
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    learners = [weight for weight in model.parameters() if weight.requires_grad]
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    torch.optim.SGD(learners, lr=1.0).step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert sum(weight.numel() for weight in learners) < 0.1 * base.num_parameters()


def test_the_seed_decides_the_adapters_of_pretrained_weights(tmp_path: Path):
    spec = tiny(path=str(saved("pythia", tmp_path)), pretrained=True, lora={})
    one, same, other = (load_model(spec, seed=seed) for seed in (0, 0, 1))
    assert equal_weights(one, same)
    differing = {name for name, weight in one.state_dict().items() if not torch.equal(weight, other.state_dict()[name])}
    assert differing
    assert all("lora_A" in name for name in differing)


def test_adapters_sit_where_the_spec_says():
    lora = LoraSpec(rank=2, alpha=4, target_modules=("dense_h_to_4h",))
    model = load_model(tiny(lora=lora), seed=0)
    adapted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert adapted
    assert all("mlp.dense_h_to_4h.lora_" in name for name in adapted)


def test_adapters_of_layers_that_the_model_lacks_are_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"must name layers of the model, but got \('q_proj',\).* query_key_value"):
        load_model(tiny(lora=LoraSpec(target_modules=("q_proj",))), seed=0)


# The character tokenizer.


def test_the_character_tokenizer_reads_text_one_character_at_a_time_and_back():
    tokenizer = character_tokenizer()
    text = "".join(ALPHABETS.values())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == list(range(4, len(tokenizer)))
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a b\n", add_special_tokens=False) == [4, 3, 5, 3]


def test_the_special_tokens_stand_where_the_tiny_configs_say():
    tokenizer = character_tokenizer()
    for known in FAMILIES.values():
        config = load_model(tiny(known.name), seed=0).config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_that_somebody_else_has_read_make_the_same_model(family: str, tmp_path: Path) -> None:
    spec = tiny(family, pretrained=True, path=str(saved(family, tmp_path)))
    weights = {name: weight.detach().numpy() for name, weight in load_model(spec, seed=0).named_parameters()}
    for array in weights.values():
        array.flags.writeable = False  # as they come out of an object store
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        theirs = load_model(spec, seed=0)(input_ids=ids).logits
        assert torch.equal(load_model(spec, seed=9, weights=weights)(input_ids=ids).logits, theirs)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    spec = tiny(pretrained=True, path=str(saved("pythia", tmp_path)))
    with pytest.raises(ValueError, match="must be those of the model"):
        load_model(spec, seed=0, weights={"head": torch.zeros(2).numpy()})


class HubThatIsBusyAtFirst(http.server.BaseHTTPRequestHandler):
    """Answers 429 twice, and then serves one repository of one file."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if len(self.asked) <= 2:
            self._answer(429, b"")
        elif self.path.startswith("/api/models/owner/name/revision/"):
            about = {"id": "owner/name", "sha": "1" * 40, "siblings": [{"rfilename": "config.json"}]}
            self._answer(200, json.dumps(about).encode())
        elif self.path.startswith(f"/api/models/owner/name/tree/{'1' * 40}"):
            self._answer(200, json.dumps([{"type": "file", "path": "config.json", "size": 2, "oid": "1"}]).encode())
        else:
            assert self.path == f"/owner/name/resolve/{'1' * 40}/config.json"
            self._answer(200, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "ETag": '"1"', "X-Repo-Commit": "1" * 40}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


def test_a_hub_that_is_busy_for_a_while_is_asked_again(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubThatIsBusyAtFirst) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        told = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        fetching = "from memray import models; models.BUSY_HUB_S = (0.1, 0.1); models.fetch('owner/name', None, ['*'])"
        done = subprocess.run(
            [sys.executable, "-c", fetching], env=os.environ | told, capture_output=True, text=True, check=False
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    (fetched,) = tmp_path.rglob("snapshots/*/config.json")
    assert fetched.read_text() == "{}"
