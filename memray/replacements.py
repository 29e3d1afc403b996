"""What stands before a target in the context probe: tokens that are true, and what stands for the others (protocol §4).

Where a replaced context does not depend on the target, all targets share it as their trunk, and behind it stand short
branches, the local tokens of one target each. This module draws and arranges tokens; it knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from transformers import PreTrainedTokenizerBase

from memray.encoding import Encoder, ordinary_ids
from memray.probes import REPLACEMENTS, Condition, Replacement
from memray.strings import IidSource, Source, Stream, TextSource

# The context probe's draws among all those of a trial's seed; the streams of strings have small numbers.
_STREAM = 1000
_ROLES: dict[Stream, int] = {"trained": 0, "held_out": 1}
# The number of what decides which remote tokens are left true, among the numbers of the replacements.
_LEFT_TRUE = 100
# Shares of remote tokens left true are kept to in every so many of them, and so before every target.
BLOCK = 4


@dataclass(frozen=True)
class Trunk:
    """A context that targets share.

    Attributes:
        ids: Token ids.
        positions: Where each token stands, for the model.
        before: How many of the tokens, BOS included, stand for the string's first j symbols.
    """

    ids: Int[ndarray, " trunk"]
    positions: Int[ndarray, " trunk"]
    before: Int[ndarray, " length"]


@dataclass(frozen=True)
class Branches:
    """What stands between a trunk and each target.

    Attributes:
        visible: How many tokens of the trunk stand before the branch; not descending.
        ids: Token ids.
        positions: Where each token stands, for the model.
    """

    visible: Int[ndarray, " targets"]
    ids: Int[ndarray, "targets local"]
    positions: Int[ndarray, "targets local"]

    def of(self, chosen: Bool[ndarray, " targets"]) -> Branches:
        """The branches of some targets."""
        return Branches(self.visible[chosen], self.ids[chosen], self.positions[chosen])

    def prompts(self, trunk: Trunk) -> list[Prompt]:
        """The same, each target with a trunk of its own."""
        return [
            Prompt(np.append(trunk.ids[:visible], ids), np.append(trunk.positions[:visible], positions))
            for visible, ids, positions in zip(self.visible, self.ids, self.positions, strict=True)
        ]


class Prompt(NamedTuple):
    """All that stands before one target; the positions ascend, but need not be consecutive."""

    ids: Int[ndarray, " tokens"]
    positions: Int[ndarray, " tokens"]


@dataclass(frozen=True)
class Draws:
    """One string, and all that may stand for its tokens: a redraw is the same whenever it is asked for.

    Attributes:
        string: Its symbols.
        number: Its number in its stream.
        stream: Whether it is trained or held out.
        source: What it was drawn from.
        encoder: What it is encoded with.
        outside_ids: The tokens that "outside" draws from.
        seed: The trial's `string_seed`.
    """

    string: Int[ndarray, " length"]
    number: int
    stream: Stream
    source: Source
    encoder: Encoder
    outside_ids: Int[ndarray, " outside"]
    seed: int

    @property
    def ids(self) -> Int[ndarray, " length"]:
        """The string's token ids."""
        return self.encoder.symbol_ids[self.string]

    @property
    def leading(self) -> Int[ndarray, " leading"]:
        """The BOS, if there is one: it always stays."""
        return np.array([] if self.encoder.bos_id is None else [self.encoder.bos_id], dtype=np.int64)

    def replaced(self, replacement: Replacement, redraw: int) -> Int[ndarray, " length"]:
        """What would stand for each token of the string.

        "source" draws symbols of their own from P_A, whatever structure the source has; "other_string" has that too.

        Raises:
            ValueError: If there are no tokens outside the alphabet although they are asked for.
        """
        rng, length = self._rng(REPLACEMENTS.index(replacement), redraw), len(self.string)
        symbol_ids, marginal = self.encoder.symbol_ids, np.asarray(self.source.marginal, dtype=np.float64)
        match replacement:
            case "source":
                return symbol_ids[rng.choice(len(marginal), length, p=marginal / marginal.sum())]
            case "other_string":
                return symbol_ids[self._other_string(redraw, rng)]
            case "wrong":
                return symbol_ids[_of_another_distribution(marginal, length, rng)]
            case "outside":
                if len(self.outside_ids) == 0:
                    raise ValueError(
                        "the replacement 'outside' must have ordinary tokens outside the alphabet to draw from, but "
                        "the alphabet is the whole vocabulary; leave it out of probes.context.replacements"
                    )
                return rng.choice(self.outside_ids, length)
            case "constant":
                return np.full(length, symbol_ids[rng.integers(len(symbol_ids))])
        raise AssertionError(f"{replacement} draws no tokens")

    def _other_string(self, redraw: int, rng: np.random.Generator) -> Int[ndarray, " length"]:
        if not isinstance(self.source, TextSource):
            return self.source.draw(len(self.string), rng)
        # A passage from anywhere in a text may be a trained one; the last in its order are held out.
        index = redraw if self.stream == "trained" else self.number + 1 + redraw
        passages = self.source.passages(
            length=len(self.string), num_strings=index + 1, seed=self.seed, stream="held_out"
        )
        return passages[index]

    def shuffled(self, chosen: Int[ndarray, " chosen"], redraw: int) -> Int[ndarray, " chosen"]:
        """The string's tokens at some places, permuted among them."""
        ranks = self._rng(REPLACEMENTS.index("shuffled"), redraw).random(len(self.string))
        return self.ids[chosen[np.argsort(ranks[chosen], kind="stable")]]

    def left_true(self, share: float, redraw: int) -> Bool[ndarray, " length"]:
        """Which tokens stay, where they are remote: as many of every block, and of them those of any smaller share.

        They do not depend on the target, so that all targets share a context here too.
        """
        num_blocks = -(-len(self.string) // BLOCK)
        ranks = self._rng(_LEFT_TRUE, redraw).random((num_blocks, BLOCK)).argsort(axis=1).argsort(axis=1)
        return ranks.ravel()[: len(self.string)] < share * BLOCK

    def trunk(self, replacement: Replacement | None, share: float, redraw: int) -> Trunk:
        """The context in which all but a share of the tokens are replaced; with None the true one."""
        num_leading = len(self.leading)
        inputs = np.arange(len(self.string) - 1)  # the last symbol is only predicted
        is_true = self.left_true(1.0 if replacement is None else share, redraw)
        if replacement == "none" or replacement == "none_in_place":
            kept = inputs[is_true[:-1]]
            ids = np.append(self.leading, self.ids[kept])
            places = np.append(np.arange(num_leading), num_leading + kept)
            before = num_leading + np.cumsum(is_true) - is_true
            return Trunk(ids, places if replacement == "none_in_place" else np.arange(len(ids)), before)
        filler = self.ids if replacement is None else self.replaced(replacement, redraw)
        ids = np.append(self.leading, np.where(is_true, self.ids, filler)[:-1])
        return Trunk(ids, np.arange(len(ids)), num_leading + np.arange(len(self.string)))

    def branches(self, trunk: Trunk, condition: Condition, targets: Int[ndarray, " targets"], redraw: int) -> Branches:
        """The local tokens of each target: true behind a context that is not, or the other way round."""
        begins = targets - condition.k
        visible, places = trunk.before[begins], begins[:, None] + np.arange(condition.k)
        if condition.keep == "local":
            shift = visible - begins if condition.replacement == "none" else np.full(len(begins), len(self.leading))
            return Branches(visible, self.ids[places], places + shift[:, None])
        if condition.is_removal:
            places = places[:, :0]
        if condition.replacement == "shuffled":
            ids = np.stack([self.shuffled(each, redraw) for each in places])
        else:
            ids = self.ids[places] if condition.is_removal else self.replaced(condition.replacement, redraw)[places]
        return Branches(visible, ids, len(self.leading) + places)

    def prompts(self, condition: Condition, targets: Int[ndarray, " targets"], redraw: int) -> list[Prompt]:
        """The prompts of targets whose remote tokens are shuffled, each target's own among themselves."""
        is_true, found = self.left_true(condition.remote_share, redraw), []
        for target in targets:
            before = self.ids[:target].copy()
            moved = np.flatnonzero(~is_true[: target - condition.k])
            before[moved] = self.shuffled(moved, redraw)
            ids = np.append(self.leading, before)
            found.append(Prompt(ids, np.arange(len(ids))))
        return found

    def _rng(self, purpose: int, redraw: int) -> np.random.Generator:
        return np.random.default_rng(
            np.random.SeedSequence([self.seed, _STREAM, _ROLES[self.stream], self.number, purpose, redraw])
        )


def _of_another_distribution(
    marginal: Float[ndarray, " alphabet"], length: int, rng: np.random.Generator
) -> Int[ndarray, " length"]:
    """Symbols of the same alphabet: uniform where the marginal is skewed, else one-token at half its entropy."""
    alphabet_size = len(marginal)
    if np.ptp(marginal) > 1e-9:
        return rng.integers(alphabet_size, size=length)
    favoured = rng.integers(alphabet_size)
    skewed = IidSource(alphabet_size=alphabet_size, entropy_bits=float(np.log2(alphabet_size)) / 2)
    names = np.arange(alphabet_size)
    names[[0, favoured]] = names[[favoured, 0]]
    return names[skewed.draw(length, rng)]


def ordinary_ids_outside(
    tokenizer: PreTrainedTokenizerBase, symbol_ids: Int[ndarray, " alphabet"]
) -> Int[ndarray, " outside"]:
    """The ordinary tokens of a vocabulary that stand for no symbol of the alphabet, ascending."""
    return np.setdiff1d(np.array(ordinary_ids(tokenizer), dtype=np.int64), symbol_ids)
