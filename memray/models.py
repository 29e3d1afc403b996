"""Loading a causal language model and its tokenizer, from the hub, a directory, or the family table alone.

Weights are read from safetensors only, and no code from a repository is run. Nothing here trains or scores.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import transformers
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from numpy import ndarray
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from memray.families import TEXT_SIZE, family, size
from memray.part import only_on_hub
from memray.spec import LoraSpec, ModelSpec
from memray.strings import ALPHABETS

# Their places are fixed: the configs of the tiny sizes name them by id.
_SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<unk>")
# Seconds before the hub is asked again that has answered 429: too many requests, of this machine or of its neighbours.
BUSY_HUB_S = (1.0, 5.0, 15.0)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny sizes: every symbol of every built-in alphabet is a token, and nothing else.

    Its four special tokens have the ids 0 … 3. What is no symbol becomes `<unk>`.
    """
    tokens = [*_SPECIAL_TOKENS, *"".join(ALPHABETS.values())]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the tiny sizes that read text: bytes, and the pieces that `pieces.txt` merges them to.

    Every text is pieces, and reads as itself again. The merges were learned once, from the glosses of WordNet 3.0 and
    the source of Python's standard library, and never change: models of this size would read other ids.
    """
    pairs = (Path(__file__).parent / "pieces.txt").read_text(encoding="utf-8").split("\n")[:-1]
    merges = [(left, right) for left, right in (pair.split(" ") for pair in pairs)]
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model: of its directory, of its hub repository, or a built-in one.

    Raises:
        ValueError: If it cannot be read.
    """
    if _is_built_in(spec):
        return text_tokenizer() if spec.size == TEXT_SIZE else character_tokenizer()
    where, revision = _location(spec)
    with _readable(where, revision):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False)
    # From a model without tokenizer files transformers makes an empty tokenizer of the model's type.
    if not {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}:
        raise ValueError(
            f"a model must come with its tokenizer, but there is none in {where!r}; save it there too, "
            "with tokenizer.save_pretrained"
        )
    return tokenizer


def load_model(
    spec: ModelSpec, *, seed: int, dtype: torch.dtype = torch.float32, weights: Mapping[str, ndarray] | None = None
) -> PreTrainedModel:
    """A causal language model on the CPU, in evaluation mode, ready to be moved and trained.

    Untrained weights and adapters are drawn on the CPU in fp32 and then cast, so that one seed means the
    same weights on every device and in every precision. No global random state is touched.

    Args:
        spec: Which model; `spec.path`, where given, replaces the hub.
        seed: The trial's `model_seed`. Decides untrained weights and adapters; published weights ignore it.
        dtype: Precision of the weights.
        weights: The published weights by name, where somebody has read them already: no weight file is opened.

    Returns:
        The model, with every dropout of its config set to `spec.dropout`. With `spec.lora` only the adapters
        require a gradient; they sit inside the model's own layers, so that it is used as any other.

    Raises:
        ValueError: If there are no weights to load, if they are incomplete or not stored as safetensors, or
            if the adapters fit no layer of the model.
    """
    config = _config(spec)
    with _seeded(seed):
        if weights is not None:
            model = _filled(config, dtype, weights)
        else:
            model = _pretrained(spec, config, dtype) if spec.pretrained else _untrained(config, dtype)
        if spec.lora is not None:
            _add_adapters(model, spec.lora)
    return model.eval()


def is_at_hand(spec: ModelSpec) -> bool:
    """Whether all that a trial needs of a model lies on this machine, so that loading it asks no network."""
    if spec.path is not None or _is_built_in(spec):
        return True
    where, revision = _location(spec)
    cached = lambda name: isinstance(try_to_load_from_cache(where, name, revision=revision), str)  # noqa: E731
    has_weights = cached("model.safetensors") or cached("model.safetensors.index.json")
    return cached("config.json") and cached("tokenizer_config.json") and (has_weights or not spec.pretrained)


def download(spec: ModelSpec) -> None:
    """Fetches a public model's config, tokenizer and, if it starts from them, weights into the hub's cache.

    Raises:
        ValueError: If the hub cannot be reached, or refuses.
    """
    where, revision = _location(spec)
    patterns = ["*.json", "*.model", "*.txt"] + (["*.safetensors"] if spec.pretrained else [])
    with _readable(where, revision):
        fetch(where, revision, patterns)


def fetch(where: str, revision: str | None, patterns: Sequence[str]) -> None:
    """Fetches the files of a repository whose names match, waiting for a hub that is busy.

    Raises:
        OSError, ValueError: What the hub's client says if it cannot.
    """
    for waits_s in (*BUSY_HUB_S, None):
        try:
            snapshot_download(where, revision=revision, allow_patterns=list(patterns))
            return
        except LocalEntryNotFoundError as error:
            if waits_s is None or not _is_busy(error):
                raise
            time.sleep(waits_s)


def _is_busy(error: LocalEntryNotFoundError) -> bool:
    """Whether the hub answered that it is asked too often."""
    return isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code == 429


def check_context(model: PreTrainedModel, num_tokens: int) -> None:
    """Refuses strings that are longer than what a model reads at once.

    The family table tells this beforehand, but for a directory only its config does.

    Args:
        model: The loaded model.
        num_tokens: Tokens a string, BOS included.

    Raises:
        ValueError: If they are too many.
    """
    longest = model.config.max_position_embeddings
    if num_tokens > longest:
        raise ValueError(
            f"a string must fit into the {longest} positions of {model.config.name_or_path or 'the model'}, "
            f"but it takes {num_tokens} tokens; shorten the strings or take another model"
        )


def freeze(model: PreTrainedModel, blocks: Sequence[int], *, embeddings: bool = False) -> None:
    """Trains all weights but those of the given blocks, counted from 0, and of the input embedding if so asked.

    Raises:
        ValueError: If the model has no such block, or its input embedding is its head.
    """
    number = model.config.num_hidden_layers
    stacks = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) == number]
    if missing := [block for block in blocks if block >= number]:
        raise ValueError(f"training.frozen_blocks must be among the {number} blocks of the model, but got {missing}")
    model.requires_grad_(True)
    for block in blocks:
        stacks[0][block].requires_grad_(False)
    if embeddings:
        table = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is not None and head.weight is table.weight:
            raise ValueError(
                "training.frozen_embeddings needs an input embedding of its own, but that of the model is its head; "
                "leave it out, or take another model"
            )
        table.requires_grad_(False)


def _is_built_in(spec: ModelSpec) -> bool:
    return spec.path is None and size(spec.family, spec.size).hub_id is None


def _location(spec: ModelSpec) -> tuple[str, str | None]:
    """The directory, or the hub repository with its revision, that a spec names."""
    if spec.path is not None:
        # Checked because transformers takes a path that does not exist for a hub repository.
        if not os.path.isdir(spec.path):  # of Path, the verb raises where a name is too long
            raise ValueError(
                f"model.path must be a directory written by save_pretrained, but {spec.path!r} is none; "
                "correct the path, or leave it out to load from the hub"
            )
        return spec.path, None
    known = size(spec.family, spec.size)
    if known.hub_id is None:
        raise ValueError(
            f"pretrained weights must come from the hub or a directory, but size {spec.size!r} of "
            f"{spec.family} has none; set model.path, or model.pretrained to false, or name a public size: "
            f"{', '.join(name for name, each in family(spec.family).sizes.items() if each.hub_id)}"
        )
    return only_on_hub(known.hub_id), spec.revision or known.revision


@contextmanager
def _readable(where: str, revision: str | None) -> Iterator[None]:
    """Turns what transformers says of a missing or broken file into a sentence that helps."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = f"{where!r} at revision {revision!r}" if revision else repr(where)
        said = " ".join(str(error).split())
        if "safetensors" in said:
            raise ValueError(_not_safetensors(name, "none")) from error
        raise ValueError(
            f"a model must be readable from a directory of save_pretrained or from the hub, but reading {name} "
            f"failed: {said}; download it where there is a network, or set model.path to a local copy with "
            "its config, weights and tokenizer"
        ) from error


def _not_safetensors(name: str, found: str) -> str:
    return (
        f"weights must be stored as safetensors (pickled files are never read), but {name} has no "
        f"model.safetensors; weight files found: {found}; convert the model where you trust it with "
        "save_pretrained, and set model.path to the result"
    )


def _config(spec: ModelSpec) -> PreTrainedConfig:
    """The model's config, with the spec's dropout and without a cache, which training has no use for."""
    if _is_built_in(spec) and not spec.pretrained:
        known = family(spec.family)
        arguments = known.config_arguments(size(spec.family, spec.size))
        config = getattr(transformers, known.config_class)(**arguments)
    else:
        where, revision = _location(spec)
        with _readable(where, revision):
            config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=False)
    for name, value in config.to_dict().items():
        if isinstance(value, float | int) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, spec.dropout)
        elif name == "layerdrop":  # leaves out whole layers: not a dropout of activations
            config.layerdrop = 0.0
    config.use_cache = False
    return config


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws from the CPU generator, seeded, and puts its state back.

    `torch.manual_seed` would also seed every accelerator, whose state would then have to be put back.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _untrained(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    # Not `model.to(dtype)`, which would also round the rotary frequencies; from_pretrained does not.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def _pretrained(spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    where, revision = _location(spec)
    if spec.path is not None:
        check_weight_files(Path(where))
    # Without it transformers asks a public service to convert pickled weights, and loads the answer.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with _readable(where, revision):
        loaded = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    model, report = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"all weights must be in the checkpoint, but {where!r} lacks {len(missing)} of them "
            f"({', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}), which would start at random; "
            "save the whole model, or set model.pretrained to false"
        )
    return model


def _filled(config: PreTrainedConfig, dtype: torch.dtype, weights: Mapping[str, ndarray]) -> PreTrainedModel:
    with no_init_weights():
        model = _untrained(config, dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"the weights must be those of the model, but differ in {parameters.keys() ^ weights.keys()}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            array = weights[name]
            parameter.copy_(torch.from_numpy(array if array.flags.writeable else array.copy()))
    return model


def check_weight_files(directory: Path) -> None:
    """Refuses a directory whose weights are not stored as safetensors.

    Raises:
        ValueError: If so.
    """
    names = {path.name for path in directory.iterdir()}
    if not names & {"model.safetensors", "model.safetensors.index.json"}:
        found = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".safetensors", ".gguf")))
        raise ValueError(_not_safetensors(repr(str(directory)), ", ".join(found) or "none"))


def _add_adapters(model: PreTrainedModel, lora: LoraSpec) -> None:
    """Puts LoRA adapters into the model's layers; everything else is frozen."""
    from peft import LoraConfig  # only here: peft is needed by nobody else

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=None if lora.target_modules is None else list(lora.target_modules),
        fan_in_fan_out=model.config.model_type == "gpt2",  # its weights are stored transposed
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, layer in model.named_modules() if _is_linear(layer)}
        raise ValueError(
            f"lora.target_modules must name layers of the model, but got {lora.target_modules}: {error}; "
            f"choose among {', '.join(sorted(linear))}"
        ) from error


def _is_linear(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
