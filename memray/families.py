"""The family table: every model family and size that a trial may name. Pure data, nothing heavy imported.

A family is added by one entry of `FAMILIES`; a size, by one entry of a family. Loading them is the business
of `models`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from memray.names import unknown_name

TINY_LEARNING_RATE = 1e-3
"""Default peak learning rate of the untrained tiny sizes (protocol §2)."""

TEXT_SIZE = "tiny-text"
"""The tiny size that reads any text, in pieces of words; "tiny" knows the built-in symbols alone."""

# Of the two tokenizers of `models`: four special tokens, and every built-in symbol; or bytes and what they merge to.
_NUM_CHARACTERS = 187
_NUM_PIECES = 2048


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a family.

    Attributes:
        hub_id: Repository on the Hugging Face hub; None where the size is built from this table alone.
        revision: Branch, tag or commit of that repository that is loaded unless a spec names another.
        num_layers: Transformer blocks.
        hidden_size: Width of the residual stream.
        num_heads: Attention heads a block.
        intermediate_size: Width of the feed-forward layer.
        vocab_size: Rows of the embedding. More than the tokenizer knows where the rows are padded.
        max_positions: Longest context in tokens, BOS included.
        num_parameters: Exact total, embeddings included, tied matrices counted once.
        num_key_value_heads: Heads of keys and values, each shared by as many heads of queries; None: as many as those.
        config: What else the config of this size says, against the habit of its family.
    """

    hub_id: str | None
    revision: str | None
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    num_parameters: int
    num_key_value_heads: int | None = None
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its config class, its defaults, its sizes.

    Attributes:
        name: Name in a spec.
        config_class: Name of the config class in `transformers`.
        config_keys: For each shape of a `Size`, the config fields that hold it.
        bos: Whether strings start with BOS unless a spec says otherwise: so where the family was pretrained
            that way.
        ties_embeddings: Whether the head is the input embedding.
        learning_rate: Default peak rate of the pretrained sizes (protocol §2).
        sizes: The sizes by name, smallest first; "tiny" and "tiny-text" are in each family.
    """

    name: str
    config_class: str
    config_keys: Mapping[str, tuple[str, ...]]
    bos: bool
    ties_embeddings: bool
    learning_rate: float
    sizes: Mapping[str, Size]

    def config_arguments(self, size: Size) -> dict[str, object]:
        """Arguments of the config class that give a model of this size its shape."""
        shape = {key: getattr(size, name) for name, keys in self.config_keys.items() for key in keys}
        return shape | dict(size.config)


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in FAMILIES:
        raise unknown_name("model family", name, sorted(FAMILIES), plural="families")
    return FAMILIES[name]


def size(family_name: str, name: str) -> Size:
    """The size of that name in a family.

    Raises:
        ValueError: If there is no such family, or no such size in it.
    """
    sizes = family(family_name).sizes
    if name not in sizes:
        raise unknown_name(f"size of {family_name}", name, sizes, plural="sizes")
    return sizes[name]


# The config fields of most families.
_COMMON_KEYS = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_heads": ("num_attention_heads",),
    "intermediate_size": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings",),
}
# And of those whose heads may share keys and values.
_GROUPED_KEYS = _COMMON_KEYS | {"num_key_value_heads": ("num_key_value_heads",)}


def _tiny(
    *,
    num_parameters: int,
    parameters_per_token: int = 256,
    intermediate_size: int = 512,
    num_key_value_heads: int | None = None,
    **config: object,
) -> dict[str, Size]:
    """The two sizes that need no hub; `num_parameters` is that of "tiny"."""
    more = parameters_per_token * (_NUM_PIECES - _NUM_CHARACTERS)
    vocabularies = {"tiny": (_NUM_CHARACTERS, 0), TEXT_SIZE: (_NUM_PIECES, more)}
    return {
        name: Size(
            hub_id=None,
            revision=None,
            num_layers=4,
            hidden_size=128,
            num_heads=4,
            intermediate_size=intermediate_size,
            vocab_size=vocab_size,
            max_positions=2048,
            num_parameters=num_parameters + beside,
            num_key_value_heads=num_key_value_heads,
            # Where the tokenizers have them. The defaults of the config classes lie among the symbols.
            config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2} | config,
        )
        for name, (vocab_size, beside) in vocabularies.items()
    }


def _public(
    hub_id: str,
    revision: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_parameters: int,
    *,
    vocab_size: int,
    max_positions: int = 2048,
    intermediate_size: int | None = None,
    num_key_value_heads: int | None = None,
    **config: object,
) -> Size:
    return Size(
        hub_id=hub_id,
        revision=revision,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        intermediate_size=intermediate_size or 4 * hidden_size,
        vocab_size=vocab_size,
        max_positions=max_positions,
        num_parameters=num_parameters,
        num_key_value_heads=num_key_value_heads,
        config=config,
    )


def _pythia(
    name: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_parameters: int,
    *,
    vocab_size: int = 50304,
    deduped: bool = True,
) -> dict[str, Size]:
    """A Pythia size and, where there is one, its twin trained on the Pile without its duplicates."""
    return {
        twin: _public(
            f"EleutherAI/pythia-{twin}",
            "step143000",  # the end of pretraining; earlier checkpoints are branches beside it
            num_layers,
            hidden_size,
            num_heads,
            num_parameters,
            vocab_size=vocab_size,
        )
        for twin in ([name, f"{name}-deduped"] if deduped else [name])
    }


_phi = partial(_public, vocab_size=51200)
_llama2 = partial(_public, vocab_size=32000, max_positions=4096)
_gpt2 = partial(_public, vocab_size=50257, max_positions=1024)
_opt = partial(_public, vocab_size=50272)


FAMILIES: dict[str, Family] = {
    "pythia": Family(
        name="pythia",
        config_class="GPTNeoXConfig",
        config_keys=_COMMON_KEYS,
        bos=False,
        ties_embeddings=False,
        learning_rate=1e-5,
        sizes={
            **_tiny(num_parameters=841_216),
            **_pythia("14m", 6, 128, 4, 14_067_712, deduped=False),
            **_pythia("31m", 6, 256, 8, 30_494_720, deduped=False),
            **_pythia("70m", 6, 512, 8, 70_426_624),
            **_pythia("160m", 12, 768, 12, 162_322_944),
            **_pythia("410m", 24, 1024, 16, 405_334_016),
            **_pythia("1b", 16, 2048, 8, 1_011_781_632),
            **_pythia("1.4b", 24, 2048, 16, 1_414_647_808),
            **_pythia("2.8b", 32, 2560, 32, 2_775_208_960),
            **_pythia("6.9b", 32, 4096, 32, 6_857_302_016, vocab_size=50432),
            **_pythia("12b", 36, 5120, 40, 11_846_072_320, vocab_size=50688),
        },
    ),
    "phi": Family(
        name="phi",
        config_class="PhiConfig",
        config_keys=_COMMON_KEYS,
        bos=False,
        ties_embeddings=False,
        learning_rate=1e-5,
        sizes={
            **_tiny(num_parameters=840_379, parameters_per_token=257),
            "1": _phi("microsoft/phi-1", "b9ac0e6d78d43970ecf88e9e0154b3a7da20ed89", 24, 2048, 32, 1_418_270_720),
            "1.5": _phi("microsoft/phi-1_5", "675aa382d814580b22651a30acb1a585d7c25963", 24, 2048, 32, 1_418_270_720),
            "2": _phi("microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23", 32, 2560, 32, 2_779_683_840),
        },
    ),
    "llama2": Family(
        name="llama2",
        config_class="LlamaConfig",
        config_keys=_GROUPED_KEYS,
        bos=True,
        ties_embeddings=False,
        learning_rate=5e-6,
        sizes={
            # Gated: three matrices of this width hold what two of 512 do in the other families.
            **_tiny(num_parameters=839_552, intermediate_size=344),
            "7b": _llama2(
                "meta-llama/Llama-2-7b-hf",
                "01c7f73d771dfac7d292323805ebc428287df4f9",
                32,
                4096,
                32,
                6_738_415_616,
                intermediate_size=11008,
            ),
            "13b": _llama2(
                "meta-llama/Llama-2-13b-hf",
                "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1",
                40,
                5120,
                40,
                13_015_864_320,
                intermediate_size=13824,
            ),
        },
    ),
    "llama3": Family(
        name="llama3",
        config_class="LlamaConfig",
        config_keys=_GROUPED_KEYS,
        bos=True,
        ties_embeddings=False,
        learning_rate=5e-6,
        sizes={
            # Gated, and wider than Llama 2 by about what two heads of keys and values save against four.
            **_tiny(num_parameters=835_456, intermediate_size=384, num_key_value_heads=2),
            "8b": _public(
                "meta-llama/Llama-3.1-8B-Instruct",
                "0e9e39f249a16976918f6564b8830bc894c89659",
                32,
                4096,
                32,
                8_030_261_248,
                vocab_size=128256,
                max_positions=131072,
                intermediate_size=14336,
                num_key_value_heads=8,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            ),
        },
    ),
    "mistral": Family(
        name="mistral",
        config_class="MistralConfig",
        config_keys=_GROUPED_KEYS,
        bos=True,
        ties_embeddings=False,
        learning_rate=5e-6,
        sizes={
            # In a block a token sees the last 16, itself included: short samples have more.
            **_tiny(num_parameters=835_456, intermediate_size=384, num_key_value_heads=2, sliding_window=16),
            "7b": _public(
                "mistralai/Mistral-7B-v0.1",
                "27d67f1b5f57dc0953326b2601d68371d40ea8da",
                32,
                4096,
                32,
                7_241_732_096,
                vocab_size=32000,
                max_positions=32768,
                intermediate_size=14336,
                num_key_value_heads=8,
                sliding_window=4096,
            ),
        },
    ),
    "gpt2": Family(
        name="gpt2",
        config_class="GPT2Config",
        config_keys={
            "num_layers": ("n_layer",),
            "hidden_size": ("n_embd",),
            "num_heads": ("n_head",),
            "intermediate_size": ("n_inner",),
            "vocab_size": ("vocab_size",),
            "max_positions": ("n_positions",),
        },
        bos=False,
        ties_embeddings=True,
        learning_rate=1e-5,
        sizes={
            **_tiny(num_parameters=1_079_424, parameters_per_token=128),
            "124m": _gpt2(
                "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 12, 768, 12, 124_439_808
            ),
            "355m": _gpt2(
                "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", 24, 1024, 16, 354_823_168
            ),
            "774m": _gpt2(
                "openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", 36, 1280, 20, 774_030_080
            ),
            "1.5b": _gpt2(
                "openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", 48, 1600, 25, 1_557_611_200
            ),
        },
    ),
    "opt": Family(
        name="opt",
        config_class="OPTConfig",
        config_keys=_COMMON_KEYS
        | {"hidden_size": ("hidden_size", "word_embed_proj_dim"), "intermediate_size": ("ffn_dim",)},
        bos=True,
        ties_embeddings=True,
        learning_rate=5e-6,
        sizes={
            **_tiny(num_parameters=1_079_680, parameters_per_token=128),
            "125m": _opt("facebook/opt-125m", "27dcfa74d334bc871f3234de431e71c6eeba5dd6", 12, 768, 12, 125_239_296),
            # The odd one out: post-norm, and embeddings of half the width.
            "350m": _opt(
                "facebook/opt-350m",
                "08ab08cc4b72ff5593870b5d527cf4230323703c",
                24,
                1024,
                16,
                331_196_416,
                word_embed_proj_dim=512,
                do_layer_norm_before=False,
            ),
            "1.3b": _opt("facebook/opt-1.3b", "3f5c25d0bc631cb57ac65913f76e22c2dfb61d62", 24, 2048, 32, 1_315_758_080),
            "2.7b": _opt("facebook/opt-2.7b", "905a4b602cda5c501f1b3a2650a4152680238254", 32, 2560, 32, 2_651_596_800),
            "6.7b": _opt("facebook/opt-6.7b", "a45aa65bbeb77c1558bc99bedc6779195462dab0", 32, 4096, 32, 6_658_473_984),
            "13b": _opt("facebook/opt-13b", "e515202d1e7750da62d245fbccb2723b9c1790f5", 40, 5120, 40, 12_853_473_280),
        },
    ),
}
