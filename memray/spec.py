"""What a trial *is*: one frozen, validated value, and the hash that names it.

A :class:`TrialSpec` says everything that is trained. What is merely looked at (:class:`ProbesSpec`) travels
with it but has an identity of its own, so that a new probe on a finished sweep need not train anything again.

Whatever the family table supplies (learning rate, BOS rule, epochs) is written into the spec when it is made:
an id then says what was done, even if the table is corrected one day.

This module knows nothing of torch, of transformers or of a cluster.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from memray import families
from memray.compute import UNHASHED, ComputeSpec
from memray.corpora import NUM_RESERVED, CorpusSpec, RowsSpec
from memray.curriculum import CurriculumSpec, OtherSpec, Stage
from memray.part import NOT_HASHED, Part, Positive, Revision, Seed, canonical_json, digest, identity_of
from memray.probes import ProbesSpec, RetentionSpec
from memray.strings import (
    ALPHABETS,
    VOCABULARY,
    IidSource,
    MarkovSource,
    MotifSource,
    Source,
    max_alphabet_size,
    read_text,
)

# Measures of the trained strings alone. `recall/robust` is not among them: it needs the held-out strings, so
# that what is looked at would decide what is trained.
STOP_METRICS = ("recall/token_accuracy", "recall/corrected_accuracy", "recall/memorised_bits", "recall/uncorrected")

# What one optimiser reads of the recipe and the other does not.
_READ_BY = {"adamw": ("beta1", "beta2", "eps"), "sgd": ("momentum",)}

# Which sources read a field of the strings that not all of them do.
_RANDOM = ("iid", "markov", "repeated", "hierarchical")
_READ_BY_KINDS = dict.fromkeys(("alphabet", "alphabet_size", "entropy_bits", "skew"), _RANDOM) | {
    "order": ("markov",),
    "conditional_entropy_bits": ("markov",),
    "motif_length": ("repeated", "hierarchical"),
    "depth": ("hierarchical",),
    "branching": ("hierarchical",),
    "path": ("text",),
    "sha256": ("text",),
}

# Ten times the longest sequence that was tried: each stage is written out as soon as a spec is made.
_MOST_STAGES = 10_000

# MLflow takes no longer value of a param.
_LONGEST_PARAM = 6000


class StringsSpec(Part):
    """Strings: how many, how long, over which alphabet, from which source (protocol, section 1).

    Attributes:
        kind: The source: independent symbols, symbols that depend on those before them, a motif over and over, motifs
            of motifs, or passages of a text. A field that it does not read must keep the default.
        alphabet: A built-in alphabet, or "vocabulary" for random ordinary token ids. A text has its own.
        alphabet_size: Number of symbols, at least 2; the first ones of the alphabet.
        entropy_bits: Target entropy of one symbol; None means uniform, log2(alphabet_size) whatever the alphabet.
        skew: How a source below the uniform entropy is skewed.
        length: Symbols a string.
        num_strings: Strings that are trained: together, or in the stages of a curriculum.
        order: Markov: how many symbols before it a symbol depends on.
        conditional_entropy_bits: Markov: target entropy of one symbol given those before it; None means that it does
            not depend on them.
        motif_length: Repeated, hierarchical: fresh symbols of a motif of the lowest level.
        depth: Hierarchical: levels of motifs above it.
        branching: Hierarchical: parts of each motif of a higher level.
        path: Text: the file, read as UTF-8. The hash covers its content and not its place.
        sha256: Text: the content, as 64 hexadecimal digits. Filled in when the spec is made; where the file differs
            from it by the time that the trial runs, the trial is refused.
    """

    kind: Literal["iid", "markov", "repeated", "hierarchical", "text"] = "iid"
    alphabet: Literal["latin", "latin_upper", "digits", "greek", "cyrillic", "cjk", "vocabulary"] = "latin"
    alphabet_size: Annotated[int, Field(ge=2, le=2**20)] = 26
    entropy_bits: float | None = None
    skew: Literal["one-token", "geometric", "zipf"] = "one-token"
    length: Annotated[int, Field(ge=2)] = 1024
    num_strings: Positive = 1
    order: Positive = 1
    conditional_entropy_bits: float | None = None
    motif_length: Annotated[int, Field(ge=2)] = 64
    depth: Annotated[int, Field(ge=0, le=32)] = 2
    branching: Annotated[int, Field(ge=3)] = 4
    path: str | None = Field(default=None, json_schema_extra=NOT_HASHED)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _source_exists(self) -> "StringsSpec":
        self._check_kind_reads_what_is_set()
        if self.kind == "text":
            self._resolve_text()
            return self
        largest = max_alphabet_size(self.alphabet)
        if largest is not None and self.alphabet_size > largest:
            raise ValueError(
                f"alphabet {self.alphabet!r} has {largest} symbols, but alphabet_size is {self.alphabet_size}; "
                "take fewer symbols or another alphabet"
            )
        self.source(seed=0)
        self._check_structure_shows()
        return self

    def _check_kind_reads_what_is_set(self) -> None:
        for name, kinds in _READ_BY_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} must keep the default under kind={self.kind!r}, which does not read it, but got "
                    f"{getattr(self, name)!r}; leave it out, or take kind={' or '.join(map(repr, kinds))}"
                )

    def _resolve_text(self) -> None:
        if self.path is None:
            raise ValueError("kind='text' needs a text to cut strings from, but got path=None; set strings.path")
        # Absolute, because workers of a cluster have working directories of their own.
        object.__setattr__(self, "path", str(Path(self.path).absolute()))
        if self.sha256 is None:
            object.__setattr__(self, "sha256", read_text(self.path)[1])

    def _check_structure_shows(self) -> None:
        """Refuses strings that end before the structure they are named after has begun."""
        if self.kind == "markov" and self.order >= self.length:
            raise ValueError(
                f"order < length must hold, or no symbol depends on any other, but got order={self.order} and "
                f"length={self.length}; lower the order or lengthen the strings"
            )
        if self.kind == "repeated" and self.motif_length > self.length:
            raise ValueError(
                f"motif_length <= length must hold, but got motif_length={self.motif_length} and length={self.length}; "
                "shorten the motif or lengthen the strings"
            )
        if self.kind == "hierarchical":
            if self.depth == 0:
                raise ValueError(
                    "depth >= 1 must hold for kind='hierarchical', but got depth=0; one motif over and over is "
                    "kind='repeated'"
                )
            needed = 2 * self.motif_length * self.branching ** (self.depth - 1)
            if needed >= self.length:
                raise ValueError(
                    "2 * motif_length * branching**(depth - 1) < length must hold, or the highest level repeats "
                    f"nothing, but got {needed} and length={self.length}; lower one of them or lengthen the strings"
                )

    @property
    def nominal_entropy_bits(self) -> float:
        """Entropy of one symbol of a random source, in bits."""
        uniform = math.log2(self.alphabet_size)
        return uniform if self.entropy_bits is None else min(self.entropy_bits, uniform)

    def canonical(self) -> "StringsSpec":
        """The same source without what follows from the rest.

        A uniform source is spelled without an entropy, and without the skew that it has not; symbols that do not depend
        on those before them without a conditional entropy, and without the order that it has not.
        """
        # Not in the validator: `vary` carries over what was written, and log2(2) bits are not uniform over 26 symbols.
        idle: list[str] = []
        if self.entropy_bits is None or abs(self.entropy_bits - math.log2(self.alphabet_size)) <= 1e-9:
            idle += ["entropy_bits", "skew"]
        conditional_bits = self.conditional_entropy_bits
        if conditional_bits is None or abs(conditional_bits - self.nominal_entropy_bits) <= 1e-9:
            idle += ["conditional_entropy_bits", "order"]
        return self.model_copy(update={name: type(self).model_fields[name].default for name in idle})

    def source(self, *, seed: int) -> Source:
        """The source that these strings are drawn from in a trial with that `string_seed`.

        Raises:
            ValueError: If there is none, or it is a text, whose symbols are tokens that only a model's tokenizer knows.
        """
        spelled = self.canonical()
        fresh = IidSource(alphabet_size=spelled.alphabet_size, entropy_bits=spelled.entropy_bits, skew=spelled.skew)
        match spelled.kind:
            case "iid":
                return fresh
            case "markov":
                bits = spelled.conditional_entropy_bits
                return MarkovSource(fresh=fresh, order=spelled.order, conditional_entropy_bits=bits, seed=seed)
            case "repeated":
                return MotifSource(fresh=fresh, motif_length=spelled.motif_length)
            case "hierarchical":
                return MotifSource(
                    fresh=fresh,
                    motif_length=spelled.motif_length,
                    depth=spelled.depth,
                    branching=spelled.branching,
                )
            case "text":
                raise ValueError("a text is a source only in the tokens of a model; ask `trial.source_of`")

    def text(self) -> str:
        """The text that strings are cut from.

        Raises:
            ValueError: If the file cannot be read, or is another one than when the spec was made.
        """
        assert self.path is not None  # the validator refuses a text without
        text, digest = read_text(self.path)
        if digest != self.sha256:
            raise ValueError(
                f"strings.path must hold the text that the spec was made from, with sha256={self.sha256}, but "
                f"{self.path} has {digest}; restore the file, or leave sha256 out to train on what it holds now"
            )
        return text


class LoraSpec(Part):
    """Low-rank adapters instead of full fine-tuning (through peft)."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class InContextSpec(Part):
    """Pre-training done here, before the trial, so that a model infers an alphabet and its frequencies in context.

    Every string is fresh, over a random alphabet of ordinary tokens with random frequencies (Dirichlet), so that
    nothing but inferring them in context lowers the loss. The rate is constant and every step has its own strings:
    fewer steps are a beginning of more (open question 3 of arXiv 2407.19262).

    Attributes:
        steps: Optimiser steps; 0 is no such pre-training.
        strings_per_step: Strings a step.
        length: Symbols a string.
        max_alphabet_size: Alphabets have from 2 to so many symbols, each size as likely.
        learning_rate: Peak rate of AdamW.
    """

    steps: Annotated[int, Field(ge=0)] = 0
    strings_per_step: Positive = 8
    length: Annotated[int, Field(ge=2)] = 64
    max_alphabet_size: Annotated[int, Field(ge=2)] = 26
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class ModelSpec(Part):
    """Which model, and from which weights it starts.

    Attributes:
        family: One of the family table.
        size: A public size of the family, or one that needs no download: its own config class at 4 layers x 128, as
            "tiny" with a tokenizer of characters, as "tiny-text" with one that reads any text.
        pretrained: Start from the published weights; otherwise from random ones of the same config.
        path: A directory written by `save_pretrained`, which then stands for the hub repository.
        revision: A hub revision, e.g. a Pythia checkpoint such as "step1000"; None is the pinned one.
        bos: Whether a BOS token precedes each string; None takes the family's rule. With BOS every symbol is
            scored, without it all but the first.
        dropout: Set in every dropout field of the config.
        lora: Adapters; None is full fine-tuning.
        in_context: Pre-training on fresh random strings, before the trial.
    """

    family: str = "pythia"
    size: str = "tiny"
    pretrained: bool = False
    path: str | None = None
    revision: Revision | None = None
    bos: bool | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora: LoraSpec | None = None
    in_context: InContextSpec = InContextSpec()

    @model_validator(mode="after")
    def _known(self) -> "ModelSpec":
        size = families.size(self.family, self.size)
        if self.path is None and size.hub_id is None and (self.pretrained or self.revision is not None):
            raise ValueError(
                f"model size {self.size!r} of {self.family} is built from a config and has no published weights, but "
                f"pretrained={self.pretrained}, revision={self.revision!r}; name a public size or a path"
            )
        if self.path is not None and self.revision is not None:
            raise ValueError(
                f"a revision belongs to the hub, but path={self.path!r} is a directory; leave out revision or path"
            )
        if self.path is None and self.revision is None and size.revision is not None:
            object.__setattr__(self, "revision", size.revision)
        if self.bos is None:
            object.__setattr__(self, "bos", families.family(self.family).bos)
        return self

    @model_validator(mode="after")
    def _can_pretrain(self) -> "ModelSpec":
        stated = self.in_context
        if stated.steps == 0:
            fields = InContextSpec.model_fields
            idle = [name for name, field in fields.items() if getattr(stated, name) != field.default]
            if idle:
                raise ValueError(
                    f"in_context.{', in_context.'.join(idle)} must be left out where in_context.steps is 0; set steps, "
                    "or leave them out"
                )
            return self
        if self.lora is not None:
            raise ValueError(
                "in_context pre-trains all weights and lora freezes them, so only one can be set, but both are; pre-"
                "train once, save the model, and set model.path"
            )
        if self.dropout:
            raise ValueError(
                f"in_context pre-trains without dropout, but got dropout={self.dropout}; leave one of the two out"
            )
        longest = families.size(self.family, self.size).max_positions
        if self.path is None and stated.length > longest:
            raise ValueError(
                f"in_context.length must be at most the {longest} positions of {self.family} {self.size}, but got "
                f"{stated.length}; shorten it"
            )
        return self


class StopWhen(Part):
    """Ends training at the first epoch that closes `epochs` consecutive ones with `metric >= at_least`."""

    metric: Literal[STOP_METRICS] = "recall/token_accuracy"  # type: ignore[valid-type]
    at_least: float = 1.0
    epochs: Positive = 1


class TrainingSpec(Part):
    """The recipe (protocol, section 2).

    Attributes:
        epochs: Of a curriculum, those of a stage. None means 100 for pretrained and 300 for untrained models.
        strings_per_step: Strings an optimiser step, of a corpus its rows; 0 means all of them.
        learning_rate: Peak rate; None takes the family's, or 1e-3 at the untrained tiny sizes.
        warmup_steps: Optimiser steps of linear warm-up before the schedule begins.
        clip_norm: Largest gradient norm; 0 switches clipping off.
        label_smoothing: Share of each target's weight that is spread over the whole vocabulary.
        strings_per_forward: Gradient accumulation: strings a forward pass inside one optimiser step; 0 means
            all of the step.
        frozen_blocks: Blocks (from 0) whose weights stay as they were.
        frozen_embeddings: Whether those of the input embedding do.
        keep_weights: Which weights stay in the ledger.
    """

    epochs: Positive | None = None
    strings_per_step: Annotated[int, Field(ge=0)] = 1
    strings_per_forward: Annotated[int, Field(ge=0)] = 0
    optimiser: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    stop_when: StopWhen | None = None
    frozen_blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    frozen_embeddings: bool = False
    keep_weights: Literal["none", "final", "probe_epochs"] = "none"

    @model_validator(mode="after")
    def _optimiser_reads_what_is_set(self) -> "TrainingSpec":
        for optimiser, names in _READ_BY.items():
            idle = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if idle and optimiser != self.optimiser:
                raise ValueError(
                    f"{', '.join(idle)} must keep the default under optimiser={self.optimiser!r}, which does not read "
                    f"it; leave it out, or take optimiser={optimiser!r}"
                )
        return self


class TrialSpec(Part):
    """One grid cell and replicate: everything that is trained, and the probes that look at it.

    What is trained are strings, unless a corpus is named.
    """

    strings: StringsSpec = StringsSpec()
    corpus: CorpusSpec | None = None
    model: ModelSpec = ModelSpec()
    training: TrainingSpec = TrainingSpec()
    compute: ComputeSpec = ComputeSpec()
    curriculum: CurriculumSpec | None = None
    probes: ProbesSpec = ProbesSpec()
    string_seed: Seed = 0
    model_seed: Seed = 0
    order_seed: Seed = 0

    @model_validator(mode="after")
    def _whole(self) -> "TrialSpec":
        self._resolve_training()
        self._check_corpus()
        self._check_length()
        self._check_vocabulary()
        self._check_curriculum()
        self._check_steps()
        self._check_frozen()
        available = self.strings.num_strings if self.corpus is None else self.corpus.num_samples
        if self.probes.compared_strings > available:
            what = "strings.num_strings" if self.corpus is None else "corpus.num_samples"
            raise ValueError(
                f"probes.compared_strings must be at most {what}, but got {self.probes.compared_strings} > "
                f"{available}; compare fewer {'strings' if self.corpus is None else 'samples'}"
            )
        return self

    def _resolve_training(self) -> None:
        training, model = self.training, self.model
        untrained_tiny = families.size(model.family, model.size).hub_id is None and not model.pretrained
        rate = families.TINY_LEARNING_RATE if untrained_tiny else families.family(model.family).learning_rate
        missing = {"epochs": 100 if model.pretrained else 300, "learning_rate": rate}
        filled = {name: value for name, value in missing.items() if getattr(training, name) is None}
        # Not through the constructor: a filled-in field must not count as set, or `vary` would carry one
        # family's learning rate over to another.
        training = training.model_copy()
        for name, value in filled.items():
            object.__setattr__(training, name, value)
        object.__setattr__(self, "training", training)

    def _check_corpus(self) -> None:
        if self.corpus is None:
            asked = ("generation", "embeddings", "facts", "prefix_lengths")
            if named := [f"probes.{name}" for name in asked if getattr(self.probes, name)]:
                raise ValueError(
                    f"{' and '.join(named)} asks for samples of a corpus, but the trial has none; set one, or leave it "
                    "out"
                )
            return
        if self.model.path is None and self.model.size == "tiny":
            raise ValueError(
                f"a corpus needs a tokenizer that reads text, but {self.model.family} tiny has one of symbols; take "
                f"model.size={families.TEXT_SIZE!r}, or a public size"
            )
        refused = {
            "strings, for it trains samples": self.strings != StringsSpec(),
            "curriculum": self.curriculum is not None,
            "probes.context": self.probes.context is not None,
            "training.stop_when": self.training.stop_when is not None,
            f"more than {NUM_RESERVED} probes.num_held_out, which a generator has": (
                self.probes.num_held_out > NUM_RESERVED and self.corpus.rows.generator is not None
            ),
        }
        if any(refused.values()):
            named = ", ".join(name for name, is_set in refused.items() if is_set)
            raise ValueError(f"a trial with a corpus must go without {named}; leave that out")
        if self.probes.facts is not None and self.corpus.rows.generator != "facts":
            raise ValueError(
                "probes.facts asks for the objects of generated facts, so corpus.rows.generator must be 'facts', but "
                f"got {self.corpus.rows.generator!r}; take that generator, or leave probes.facts out"
            )
        if self.probes.facts is not None and self.probes.facts.num_facts > self.corpus.num_samples:
            raise ValueError(
                f"probes.facts.num_facts must be at most corpus.num_samples, but got {self.probes.facts.num_facts} > "
                f"{self.corpus.num_samples}; ask of fewer"
            )

    def _check_length(self) -> None:
        if self.model.path is not None:
            return  # the directory's own config says; models.py checks it
        longest = families.size(self.model.family, self.model.size).max_positions
        if self.num_tokens > longest:
            what, stated = "strings", f"strings.length={self.strings.length} with bos={self.model.bos}"
            if self.corpus is not None:
                what, packed = "samples", f"samples_per_row={self.corpus.samples_per_row}"
                stated = f"corpus.max_tokens={self.corpus.max_tokens} and {packed}"
            raise ValueError(
                f"{self.model.family} {self.model.size} reads at most {longest} tokens, but {stated} needs "
                f"{self.num_tokens}; shorten the {what} or take another model"
            )

    def _check_vocabulary(self) -> None:
        drawn = [each for each in (self.strings, self.other_strings()) if each and each.alphabet == VOCABULARY]
        if not drawn or self.model.path is not None:
            return
        size = families.size(self.model.family, self.model.size)
        # The character tokenizer of a tiny size has the built-in symbols, and its special tokens are no symbols. How
        # many of a public vocabulary are special, its tokenizer says.
        largest = sum(map(len, ALPHABETS.values())) if size.hub_id is None else size.vocab_size
        if (asked := max(each.alphabet_size for each in drawn)) > largest:
            raise ValueError(
                f"alphabet 'vocabulary' has at most the {largest} ordinary tokens of {self.model.family} "
                f"{self.model.size}, but alphabet_size is {asked}; lower it or take another model"
            )

    def _check_curriculum(self) -> None:
        if self.curriculum is None:
            if self.probes.retention != RetentionSpec():
                raise ValueError(
                    "probes.retention asks for strings of earlier stages, but the trial has no curriculum; set one, or "
                    "leave it out"
                )
            return
        if (count := self.strings.num_strings // self.curriculum.strings_per_stage) > _MOST_STAGES:
            raise ValueError(
                f"a curriculum must have at most {_MOST_STAGES} stages, but strings.num_strings="
                f"{self.strings.num_strings} makes {count}; train fewer strings, or more a stage"
            )
        self.curriculum.stages(self.strings.num_strings)
        if self.strings.kind == "text" and self.curriculum.unrepeated:
            raise ValueError(
                "curriculum.unrepeated needs a source that never runs out, but strings.kind is 'text'; take a random "
                "source, or leave it out"
            )
        refused = {
            "probes.context": self.probes.context is not None,
            "probes.compared_strings": self.probes.compared_strings > 0,
            "probes.num_held_out=0, for robust recall is measured against held-out strings": (
                self.probes.num_held_out == 0
            ),
            "curriculum.weights='base' on many devices": (
                self.curriculum.weights == "base" and self.compute.engine != "torch"
            ),
            "training.keep_weights='probe_epochs'": self.training.keep_weights == "probe_epochs",
            "training.stop_when beside curriculum.unrepeated, whose steps are counted": (
                self.training.stop_when is not None and bool(self.curriculum.unrepeated)
            ),
            "training.strings_per_forward beside curriculum.replay_share": (
                self.training.strings_per_forward > 0 and self.curriculum.replay_share > 0
            ),
        }
        if any(refused.values()):
            named = ", ".join(name for name, is_set in refused.items() if is_set)
            raise ValueError(f"a trial with a curriculum must go without {named}; change that")

    def _check_steps(self) -> None:
        strings, step = self.strings_together, self.training.strings_per_step or self.strings_together
        if strings % step:
            whole = "strings.num_strings" if self.curriculum is None else "curriculum.strings_per_stage"
            whole = whole if self.corpus is None else "the rows that an epoch of the corpus shows"
            raise ValueError(
                f"training.strings_per_step must divide {whole}, so that every step of an epoch is the same "
                f"size, but got {step} and {strings}; take a divisor, or 0 for all strings"
            )
        workers, forward = self.compute.workers, self.training.strings_per_forward
        if step > workers and step % workers:
            raise ValueError(
                f"a step's strings must be a multiple of compute.workers, or fewer than they are, but got {step} "
                f"strings a step and {workers} workers; change training.strings_per_step or compute.workers"
            )
        if forward and self.strings_per_worker % forward:
            raise ValueError(
                f"training.strings_per_forward must divide the {self.strings_per_worker} strings that a worker has in "
                f"a step, but got {forward}; take a divisor, or 0 for one forward pass a step"
            )

    def _check_frozen(self) -> None:
        frozen = self.training.frozen_blocks
        if list(frozen) != sorted(set(frozen)):
            raise ValueError(f"training.frozen_blocks must ascend without repetition, but got {list(frozen)}")
        if frozen and self.model.lora is not None:
            raise ValueError(
                "lora freezes every block already, so training.frozen_blocks must be left out, but got "
                f"{list(frozen)}; choose one of the two"
            )
        family = families.family(self.model.family)
        is_tied = family.ties_embeddings and self.model.path is None
        if self.training.frozen_embeddings and (self.model.lora is not None or is_tied):
            why = "lora freezes them already" if self.model.lora is not None else f"those of {family.name} are its head"
            raise ValueError(f"training.frozen_embeddings must be left out where {why}; leave it out")
        num_blocks = families.size(self.model.family, self.model.size).num_layers
        if frozen and self.model.path is None and frozen[-1] >= num_blocks:
            raise ValueError(
                f"training.frozen_blocks must be among the blocks 0 to {num_blocks - 1} of {self.model.family} "
                f"{self.model.size}, but got {list(frozen)}"
            )

    def source(self) -> Source:
        """The source of the trial's strings.

        Raises:
            ValueError: If it is a text, whose symbols are tokens that only the model's tokenizer knows.
        """
        return self.strings.source(seed=self.string_seed)

    def other_strings(self) -> StringsSpec | None:
        """The strings of the stages that have another source; None where no stage has.

        Raises:
            ValueError: If there is no such source.
        """
        other = self.curriculum.other if self.curriculum else None
        if other is None:
            return None
        if self.strings.kind == "text":
            raise ValueError(
                "curriculum.other changes the symbols of a random source, but strings.kind is 'text'; leave it out"
            )
        stated = self.strings.model_dump(exclude_unset=True) | other.changes()
        if "alphabet" in other.changes() and other.alphabet_size is None and "alphabet_size" not in stated:
            stated["alphabet_size"] = self.strings.alphabet_size
        return StringsSpec(**stated)

    def stages(self) -> tuple[Stage, ...]:
        """What is trained one after the other; without a curriculum there are no stages."""
        return self.curriculum.stages(self.strings.num_strings) if self.curriculum else ()

    @property
    def strings_together(self) -> int:
        """Strings that are trained together: all, or those of a stage. Of a corpus, the rows of an epoch."""
        if self.corpus is not None:
            return self.corpus.num_rows_shown // self.corpus.samples_per_row
        return self.curriculum.strings_per_stage if self.curriculum else self.strings.num_strings

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads of a string at once, with its BOS; of a corpus, of a row at most."""
        if self.corpus is not None:
            return self.corpus.max_tokens * self.corpus.samples_per_row
        return self.strings.length + bool(self.model.bos)

    @property
    def num_epochs(self) -> int:
        """Epochs at most, of all stages together; `stop_when` may end training, or each stage, earlier."""
        assert self.training.epochs is not None  # filled in by the validator
        return self.training.epochs * (len(self.stages()) or 1)

    @property
    def strings_per_worker(self) -> int:
        """Strings of a step that each worker computes: its share, or all where they are fewer than the workers."""
        step = self.training.strings_per_step or self.strings_together
        return step // self.compute.workers if step >= self.compute.workers else step

    @property
    def has_dropout(self) -> bool:
        """Whether anything is dropped out while the model trains; then a training forward measures nothing."""
        return self.model.dropout > 0 or (self.model.lora is not None and self.model.lora.dropout > 0)

    @property
    def scores_apart(self) -> bool:
        """Whether an epoch's strings are scored in passes of their own, and not in the step that trains on them."""
        return self.steps_per_epoch > 1 or self.has_dropout

    @property
    def num_targets(self) -> int:
        """Scored tokens of a string: without a BOS nothing predicts the first."""
        return self.strings.length - (not self.model.bos)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return self.strings_together // (self.training.strings_per_step or self.strings_together)

    def canonical_json(self) -> str:
        """What the trial id hashes: the fields of what is trained that differ from their defaults."""
        identity = identity_of(self)
        identity.pop("probes", None)
        return canonical_json(identity)

    def trial_id(self) -> str:
        """The identity of what is trained: 12 hexadecimal digits of a SHA-256."""
        return digest(self.canonical_json())

    def cell_id(self) -> str:
        """The identity of the cell: of the trial without its seeds, which are replicates."""
        identity = identity_of(self)
        for seed in ("probes", "string_seed", "model_seed", "order_seed"):
            identity.pop(seed, None)
        return digest(canonical_json(identity))

    def params(self) -> dict[str, str | int | float | bool]:
        """The flattened spec: the same keys for every trial, numbers bare, "none" where nothing applies.

        The nominal entropy stands where the spec says "uniform", because a chart has no use for a missing one. The skew
        stands there too, because the uniform source is the upper end of each of them. So do the conditional entropy and
        the order of symbols that depend on nothing.
        """
        unhashed = {"rows": {"path"}, "foreign": {"path"}}
        excluded = {"probes": True, "compute": set(UNHASHED), "strings": {"path"}, "corpus": unhashed}
        flat = _flatten(self.model_dump(mode="json", exclude=excluded))
        entropy_bits, conditional_bits = self.strings.nominal_entropy_bits, self.strings.conditional_entropy_bits
        conditional_bits = entropy_bits if conditional_bits is None else conditional_bits
        flat["strings.entropy_bits"] = round(entropy_bits, 6)
        flat["strings.conditional_entropy_bits"] = round(conditional_bits, 6)
        idle = {f"strings.{name}" for name, kinds in _READ_BY_KINDS.items() if self.strings.kind not in kinds}
        flat.update(dict.fromkeys(idle & flat.keys(), "none"))
        for optimiser, names in _READ_BY.items():
            if optimiser != self.training.optimiser:
                flat.update({f"training.{name}": "none" for name in names})
        if self.compute.engine == "torch":
            flat["compute.zero_stage"] = "none"
        if self.model.in_context.steps == 0:
            flat.update({f"model.in_context.{name}": "none" for name in InContextSpec.model_fields if name != "steps"})
        for name in ("training.frozen_blocks", "curriculum.revisits", "curriculum.unrepeated"):
            flat[name] = flat.get(name) or "none"
        flat["curriculum.num_stages"] = len(self.stages()) or "none"
        for name, part in (
            ("model.lora", LoraSpec),
            ("training.stop_when", StopWhen),
            ("curriculum", CurriculumSpec),
            ("curriculum.other", OtherSpec),
            ("corpus", CorpusSpec),
            ("corpus.rows", RowsSpec),
            ("corpus.foreign", RowsSpec),
        ):
            if flat.pop(name, "") == "none":
                flat.update({f"{name}.{key}": "none" for key in part.model_fields if key != "path"})
        if self.corpus is not None:
            flat.update({name: "none" for name in flat if name.startswith("strings.")})
        return {name: _shortened(value) for name, value in sorted(flat.items())}


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if key == "options":  # which there are hangs on the generator: one param for all of them
            flat[prefix + key] = ",".join(f"{name}={option}" for name, option in item.items()) or "none"
        elif isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat[prefix + key] = ",".join(map(str, item))
        else:
            flat[prefix + key] = "none" if item is None else item
    return flat


def _shortened(value: Any) -> Any:
    """The value, or where it is too long for a param its beginning and a digest that tells it from others."""
    if not isinstance(value, str) or len(value) <= _LONGEST_PARAM:
        return value
    return f"{value[: _LONGEST_PARAM - 16]} … {digest(value)}"
