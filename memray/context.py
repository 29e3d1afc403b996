"""The prefix and context probe: what a model predicts after prefixes that are true in part only (protocol §4).

A trunk that targets share is read once, its keys and values are kept, and behind it many branches are packed into one
row. What a branch must not see, a mask hides. This is exact: a branch sees the same tokens at the same positions as a
prompt of its own. Where there is no trunk, each target gets a prompt. What stands in trunks, branches and prompts is
the business of `replacements`, and what the predictions mean that of `measures.prefix`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn
from transformers import DynamicCache

from memray.encoding import Encoder
from memray.measures.prefix import FULL, ContextScores
from memray.probes import KEEPS, REPLACEMENTS, Condition, ContextSpec
from memray.replacements import Branches, Draws, Prompt, Trunk
from memray.scoring import AlphabetIds, body_and_head, chunks, fp32_logits, score_logits, vocabulary_size
from memray.strings import Source, Stream

# What bounds a forward pass, and decides the last bits: entries of the mask of packed branches, tokens of prompts. Most
# of a mask is hidden and computed all the same: on a CPU small packs waste less, elsewhere launches cost more.
MASK_ENTRIES = {"cpu": 2**18, "cuda": 2**22}
TOKENS_PER_PASS = 4096

# Where only the distance between two tokens counts. (Not where the rotation depends on the length of the text.)
_ROTARY = ("gpt_neox", "phi", "llama", "mistral")
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def probe_context(
    model: nn.Module,
    strings: Int[ndarray, "strings length"],
    *,
    source: Source,
    encoder: Encoder,
    outside_ids: Int[ndarray, " outside"],
    spec: ContextSpec,
    seed: int,
    stream: Stream = "trained",
) -> ContextScores:
    """Puts strings through every condition of a context probe.

    All draws come from generators of their own, seeded by the trial's seed, the stream and the number of the string,
    the replacement and the redraw: whoever repeats the probe, at any epoch, draws the same.

    Args:
        model: Left as it is found, in training or in evaluation mode.
        strings: Symbols of all strings of the stream; the spec says how many of them are probed.
        source: What they were drawn from.
        encoder: What they are encoded with.
        outside_ids: The tokens that "outside" draws from; see :func:`ordinary_ids_outside`.
        spec: The conditions.
        seed: The trial's `string_seed`.
        stream: Which strings they are.

    Raises:
        ValueError: If some blocks of the model see less of a string than others, if nothing lies outside the
            alphabet although "outside" is asked for, or if there is no string to probe.
    """
    strings = strings[: spec.num_probed(stream, len(strings))]
    if len(strings) == 0:
        raise ValueError(f"a context probe needs at least one string, but the spec probes none of the {stream} ones")
    reader = Reader.of(model, encoder.symbol_ids, source)
    _check_one_window(reader.body, strings.shape[1] + 1)
    rows: list[dict[str, ndarray]] = []
    extractable = np.zeros((len(strings), len(spec.extractable)))
    with _evaluating(model), torch.no_grad():
        for number, string in enumerate(strings):
            draws = Draws(string, number, stream, source, encoder, outside_ids, seed)
            for look in looks(reader, draws, spec):
                rows += look.rows(number, reader.predictions(look.states, draws.ids[look.targets]))
            extractable[number] = [extractable_share(reader, encoder, string, k) for k in spec.extractable]
    columns = {name: np.concatenate([each[name] for each in rows]) for name in ContextScores.COLUMNS}
    return ContextScores(**columns, extractable=extractable)


# --- reading predictions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadTrunk:
    """A trunk as the model has read it."""

    hidden: Float[Tensor, "trunk hidden"]
    keys_and_values: list[tuple[Float[Tensor, "1 heads trunk width"], Float[Tensor, "1 heads trunk width"]]]


class Predictions(NamedTuple):
    """What the model says of some targets."""

    log_prob: Float[ndarray, " targets"]
    log_mass: Float[ndarray, " targets"]
    is_right: Bool[ndarray, " targets"]


@dataclass(frozen=True)
class Reader:
    """A model that predicts what follows trunks, branches and prompts; expects evaluation mode and no gradients."""

    body: nn.Module
    head: nn.Module
    alphabet: AlphabetIds
    device: torch.device

    @property
    def is_rotary(self) -> bool:
        """Whether only the distance between two tokens counts for the model, and not where they stand."""
        config: Any = self.body.config
        rope = getattr(config, "rope_parameters", None) or {}
        return config.model_type in _ROTARY and rope.get("rope_type") not in _LENGTH_DEPENDENT

    @property
    def window(self) -> int | None:
        """How many tokens a token sees, itself included; None: all before it."""
        return _window(self.body.config)

    @classmethod
    def of(cls, model: nn.Module, symbol_ids: Int[ndarray, " alphabet"], source: Source) -> Reader:
        """The reader of a causal model."""
        body, head = body_and_head(model)
        device = next(body.parameters()).device
        marginal = torch.tensor(np.asarray(source.marginal), dtype=torch.float32)
        return cls(body, head, AlphabetIds(torch.as_tensor(symbol_ids), marginal).to(device), device)

    def trunk(self, trunk: Trunk) -> ReadTrunk:
        """Reads a trunk of at least one token."""
        cache = DynamicCache()  # without the config: under a sliding window it would drop keys that branches need
        output = self.body(
            input_ids=self._tensor(trunk.ids[None]),
            position_ids=self._tensor(trunk.positions[None]),
            past_key_values=cache,
            use_cache=True,
        )
        return ReadTrunk(output.last_hidden_state[0], [(layer.keys, layer.values) for layer in cache.layers])  # type: ignore[misc]

    def behind(self, trunk: ReadTrunk, branches: Branches) -> Float[Tensor, "targets hidden"]:
        """The state that predicts each target, from packed branches; where they are empty, from the trunk itself."""
        num_local = branches.ids.shape[1]
        if num_local == 0:
            return trunk.hidden[self._tensor(branches.visible - 1)]
        limit = MASK_ENTRIES.get(self.device.type, MASK_ENTRIES["cuda"])
        return torch.cat([self._pack(trunk, branches, part) for part in packs(branches.visible, num_local, limit)])

    def _pack(self, trunk: ReadTrunk, branches: Branches, part: slice) -> Float[Tensor, "targets hidden"]:
        """The states of some branches, all in one row."""
        visible, ids = branches.visible[part], branches.ids[part]
        num_visible, num_local = int(visible[-1]), ids.shape[1]
        cache = DynamicCache()  # a fresh one each time: the model appends to it
        for layer, (keys, values) in enumerate(trunk.keys_and_values):
            cache.update(keys[:, :, :num_visible], values[:, :, :num_visible], layer)
        hidden = self.body(
            input_ids=self._tensor(ids.reshape(1, -1)),
            position_ids=self._tensor(branches.positions[part].reshape(1, -1)),
            attention_mask=self._mask(visible, num_local, trunk.hidden.dtype),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[0, num_local - 1 :: num_local]

    def _mask(
        self, visible: Int[ndarray, " targets"], num_local: int, dtype: torch.dtype
    ) -> Float[Tensor, "1 1 queries keys"]:
        """0 where a token of a branch sees one of the trunk or of its own branch, and minus infinity elsewhere."""
        query = torch.arange(len(visible) * num_local, device=self.device)
        branch, key = query // num_local, torch.arange(int(visible[-1]), device=self.device)
        num_seen = self._tensor(visible)[branch]
        in_trunk = key < num_seen[:, None]
        in_branch = (branch[:, None] == branch) & (query[:, None] >= query)
        if self.window is not None:  # it counts the tokens of a text, wherever they stand
            in_trunk &= key > (num_seen + query % num_local - self.window)[:, None]
            in_branch &= query > query[:, None] - self.window
        mask = torch.zeros(1, 1, len(query), in_trunk.shape[1] + len(query), dtype=dtype, device=self.device)
        return mask.masked_fill_(~torch.cat([in_trunk, in_branch], dim=1), torch.finfo(dtype).min)

    def after(self, prompts: Sequence[Prompt]) -> Float[Tensor, "targets hidden"]:
        """The state that predicts what follows each prompt, from prompts padded on the right."""
        states, begin = [], 0
        while begin < len(prompts):
            end, longest = begin, 0
            while end < len(prompts):
                longest = max(longest, len(prompts[end].ids))
                if end > begin and (end + 1 - begin) * longest > TOKENS_PER_PASS:
                    break
                end += 1
            states.append(self._batch(prompts[begin:end]))
            begin = end
        return torch.cat(states)

    def _batch(self, prompts: Sequence[Prompt]) -> Float[Tensor, "targets hidden"]:
        lengths = np.array([len(prompt.ids) for prompt in prompts])
        ids, positions = np.zeros((2, len(prompts), lengths.max()), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]], positions[row, : lengths[row]] = prompt
        # The mask hides nothing, for padding stands on the right, where causal attention never looks. But without one
        # (and without a cache) a jump between positions is taken for the start of another text.
        hidden = self.body(
            input_ids=self._tensor(ids),
            position_ids=self._tensor(positions),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64, device=self.device),
        ).last_hidden_state
        return hidden[torch.arange(len(prompts), device=self.device), self._tensor(lengths - 1)]

    def predictions(self, states: Float[Tensor, "targets hidden"], target_ids: Int[ndarray, " targets"]) -> Predictions:
        """What the states say of their targets."""
        ids = self._tensor(target_ids)
        columns = [
            score_logits(fp32_logits(self.head, states[part]), ids[part], self.alphabet)
            for part in chunks(len(ids), vocabulary_size(self.head))
        ]
        log_prob, log_mass, argmax = (
            torch.cat([getattr(each, name) for each in columns]) for name in ("log_prob", "log_mass", "argmax")
        )
        return Predictions(log_prob.cpu().numpy(), log_mass.cpu().numpy(), (argmax == ids).cpu().numpy())

    def _tensor(self, array: Int[ndarray, "..."]) -> Int[Tensor, "..."]:
        return torch.tensor(array, device=self.device)  # a copy: torch warns of arrays that cannot be written


def packs(visible: Int[ndarray, " targets"], num_local: int, max_mask_entries: int) -> Iterator[slice]:
    """Branches in order, as many at a time as have a mask of at most so many entries; at least one.

    A pack of b branches has b · k queries, and as many keys behind those of the trunk that its last branch sees.
    """
    begin = 0
    while begin < len(visible):
        end = begin + 1
        while end < len(visible) and mask_entries(visible[begin : end + 1], num_local) <= max_mask_entries:
            end += 1
        yield slice(begin, end)
        begin = end


def mask_entries(visible: Int[ndarray, " targets"], num_local: int) -> int:
    """Entries of the mask of one pack of branches."""
    num_queries = len(visible) * num_local
    return num_queries * (int(visible[-1]) + num_queries)


def extractable_share(reader: Reader, encoder: Encoder, string: Int[ndarray, " length"], k: int) -> float:
    """The share of a string's windows of 2 k symbols that are (k, k)-extractable; nan if it has none.

    A window is extractable if greedy decoding after its first k symbols alone (and BOS) gives its other k. That follows
    them exactly as long as every arg-max under teacher forcing is right, so one pass says it.
    """
    if len(string) < 2 * k:
        return float("nan")
    windows = np.lib.stride_tricks.sliding_window_view(encoder.symbol_ids[string], 2 * k).copy()
    if encoder.bos_id is not None:
        windows = np.insert(windows, 0, encoder.bos_id, axis=1)
    num_extracted, size = 0, max(1, TOKENS_PER_PASS // windows.shape[1])
    for begin in range(0, len(windows), size):
        part = windows[begin : begin + size]
        ids = torch.as_tensor(part, device=reader.device)
        states = reader.body(input_ids=ids[:, :-1]).last_hidden_state[:, -k:].flatten(0, 1)
        is_right = reader.predictions(states, part[:, -k:].ravel()).is_right
        num_extracted += int(is_right.reshape(-1, k).all(axis=1).sum())
    return num_extracted / len(windows)


# --- one string --------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """The states that predict some targets, under conditions that come to the same; None is the full true prefix."""

    conditions: Sequence[Condition | None]
    redraw: int
    targets: Int[ndarray, " targets"]
    states: Float[Tensor, "targets hidden"]

    def rows(self, string: int, predictions: Predictions) -> Iterator[dict[str, ndarray]]:
        """The columns of the records, once a condition."""
        for condition in self.conditions:
            same = {"string": np.int32(string), "redraw": np.int8(self.redraw)}
            if condition is None:
                same |= _codes(KEEPS.index("local"), FULL, 1.0, -1)
            else:
                replacement = REPLACEMENTS.index(condition.replacement)
                same |= _codes(KEEPS.index(condition.keep), condition.k, condition.remote_share, replacement)
            columns = {name: np.full(len(self.targets), value) for name, value in same.items()}
            yield columns | {"position": self.targets.astype(np.int32)} | predictions._asdict()


def _codes(keep: int, k: int, remote_share: float, replacement: int) -> dict[str, np.generic]:
    return {
        "keep": np.int8(keep),
        "k": np.int32(k),
        "remote_share": np.float32(remote_share),
        "replacement": np.int8(replacement),
    }


def looks(reader: Reader, draws: Draws, spec: ContextSpec) -> Iterator[Look]:
    """One string under every condition of the spec."""
    length, has_bos = len(draws.string), draws.encoder.bos_id is not None
    true = draws.trunk(None, 1.0, 0)
    read_true = reader.trunk(true)
    targets = np.arange(0 if has_bos else 1, length)
    yield Look([None], 0, targets, read_true.hidden[true.before[targets] - 1])
    for conditions in _sharing_trunks(spec.conditions(length), is_same_in_place=not has_bos and reader.is_rotary):
        some = next(iter(conditions))
        for redraw in range(spec.redraws if some.is_random else 1):
            trunk, read = true, read_true
            if some.keep == "local" and not some.needs_prompts:
                trunk = draws.trunk(some.replacement, some.remote_share, redraw)
                read = reader.trunk(trunk) if len(trunk.ids) > 1 else None  # a BOS alone is not worth sharing
            for condition, names in conditions.items():
                targets = np.array(spec.positions(condition, length, bos=has_bos), dtype=np.int64)
                if some.needs_prompts:
                    yield Look(names, redraw, targets, reader.after(draws.prompts(condition, targets, redraw)))
                    continue
                branches = draws.branches(trunk, condition, targets, redraw)
                is_defined = branches.visible + branches.ids.shape[1] > 0
                if is_defined.any():
                    branches = branches.of(is_defined)
                    states = reader.behind(read, branches) if read else reader.after(branches.prompts(trunk))
                    yield Look(names, redraw, targets[is_defined], states)


def _sharing_trunks(
    conditions: Sequence[Condition], *, is_same_in_place: bool
) -> Iterator[dict[Condition, list[Condition | None]]]:
    """Conditions that share a trunk, and of each those that come to the same and are computed but once.

    Where only distances count and there is no BOS, removing all that is remote leaves the same text at any place; and
    behind a remote context that stays, nothing is left that could keep its place.
    """
    groups: dict[tuple[str, float, str], dict[Condition, list[Condition | None]]] = {}
    for condition in conditions:
        computed = condition
        if condition.replacement == "none_in_place" and (
            condition.keep == "remote" or (is_same_in_place and not condition.remote_share)
        ):
            computed = condition._replace(replacement="none")
        group = groups.setdefault((computed.keep, computed.remote_share, computed.replacement), {})
        group.setdefault(computed, []).append(condition)
    yield from groups.values()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _window(config: Any) -> int | None:
    """How many tokens a token sees at most, itself included, in the blocks that see fewest; None: all before it."""
    kinds = set(getattr(config, "layer_types", None) or ())
    is_unused = not getattr(config, "use_sliding_window", True) or kinds == {"full_attention"}
    return None if is_unused else getattr(config, "sliding_window", None)


def _check_one_window(model: nn.Module, num_tokens: int) -> None:
    """Refuses a model of which some blocks see only the last tokens and others more: one mask cannot show both."""
    config: Any = model.config
    kinds, window = set(getattr(config, "layer_types", None) or ()), _window(config)
    if len(kinds) > 1 and window is not None and window < num_tokens:
        raise ValueError(
            f"the context probe needs a model whose blocks all see equally far, but some of {config.model_type} see "
            f"{window} tokens and others more, and a string has {num_tokens}; shorten the strings, or leave out "
            "probes.context"
        )
