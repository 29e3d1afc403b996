"""Generators: a contract for all of them, and for each an oracle of its own: counts, enumeration, closed forms."""

import ast
import functools
import hashlib
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from memray.generators import GENERATORS, Generator, Sample, generator
from memray.generators.facts import NUM_OBJECTS, NUM_TEMPLATES, RELATIONS, Fact, Facts, fact_table, objects
from memray.generators.lexicon import GIVEN_NAMES, LISTS, NUM_NAMES, SURNAMES, THINGS, WORDS, names
from memray.generators.prose import MAX_TEMPLATES, Biographies, Questions
from memray.generators.puzzles import Claim, Connective, Puzzles, Statement, solutions
from memray.generators.random_words import BLOCK_SIZE, GROUP_SIZE, NUM_WORDS, Frequencies, Overlap, Overlapping
from memray.generators.sample import Purpose, random_generator
from memray.generators.source import BODY_LINES, PythonSource, library_functions, library_modules

ARMS: list[tuple[Overlap, Overlap]] = [("low", "low"), ("low", "high"), ("high", "low"), ("high", "high")]

CASES: list[Generator] = [
    *(kind() for kind in GENERATORS.values()),
    *(Facts(template=template) for template in range(1, NUM_TEMPLATES)),
    Facts(num_templates=NUM_TEMPLATES),
    Biographies(num_templates=1, num_sentences=2),
    Biographies(num_sentences=4),
    Puzzles(num_inhabitants=3),
    Puzzles(num_inhabitants=4),
    *(Overlapping(prefix_overlap=prefix, continuation_overlap=continuation) for prefix, continuation in ARMS[1:]),
    Frequencies(skew=1.0),
    Frequencies(skew=4.0),
]
# Source has lines, and there is as much of it as people wrote.
INVENTED = [case for case in CASES if not isinstance(case, PythonSource)]


# The contract of every generator.


@functools.cache
def drawn(case: Generator) -> list[Sample]:
    """Many samples, drawn once for all tests."""
    return case.samples(250, seed=1)


@pytest.mark.parametrize("case", INVENTED, ids=str)
def test_samples_are_ascii_on_one_line_parted_by_one_space(case: Generator) -> None:
    for prefix, reference in drawn(case):
        text = prefix + reference
        assert text.isascii()
        assert text.isprintable(), "a line end or a tab is not"
        assert prefix
        assert reference.strip()
        assert reference.startswith(" ")
        assert text == " ".join(text.split()), "one space between words, none around them"
        assert not re.search(r"\b[Aa] [aeiou]|[{}]", text), "an article that does not fit, or a gap left open"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefixes_are_distinct(case: Generator) -> None:
    assert len({prefix for prefix, _ in drawn(case)}) == 250


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fewer_samples_are_the_first_of_more(case: Generator) -> None:
    for num_samples in (1, 2, 50):
        assert case.samples(num_samples, seed=1) == drawn(case)[:num_samples]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_seeds_give_equal_samples_and_others_give_others(case: Generator) -> None:
    first, other = (case.samples(30, seed=seed) for seed in (1, 5))
    assert first == drawn(case)[:30]
    # References of facts are one of 32 words, and may be the same by chance.
    assert sum(a.prefix == b.prefix for a, b in zip(first, other, strict=True)) == 0
    assert sum(a.reference == b.reference for a, b in zip(first, other, strict=True)) < 15


@pytest.mark.parametrize("case", INVENTED, ids=str)
def test_there_are_twenty_thousand_samples(case: Generator) -> None:
    assert case.limit >= 20_000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beyond_the_limit_one_is_told_how_many_there_are(case: Generator) -> None:
    for num_samples in (0, -1, case.limit + 1):
        with pytest.raises(ValueError, match=rf"1 <= num_samples <= {case.limit} must hold .* got num_samples="):
            case.samples(num_samples, seed=0)
    with pytest.raises(ValueError, match="seed >= 0 must hold, but got seed=-1"):
        case.samples(1, seed=-1)


def test_the_things_and_names_that_tell_samples_apart_are_distinct() -> None:
    everything = names(NUM_NAMES, np.random.default_rng(0))
    assert len(set(everything)) == NUM_NAMES == len(GIVEN_NAMES) * len(SURNAMES)
    for distinct in (THINGS, GIVEN_NAMES, WORDS, *LISTS.values()):
        assert len(set(distinct)) == len(distinct)


def test_generators_of_different_kinds_share_next_to_no_person_under_one_seed() -> None:
    num, seed = 2000, 0
    fact_subjects = {fact.subject for fact in fact_table(num * len(RELATIONS), seed)}
    words = [prefix.rstrip(".").split() for prefix, _ in Biographies().samples(num, seed=seed)]
    shared = len(fact_subjects & {" ".join(pair) for each in words for pair in itertools.pairwise(each)})
    # Poisson with a mean of num² / NUM_NAMES = 9.3: 5 standard deviations.
    assert abs(shared - num**2 / NUM_NAMES) < 5 * (num**2 / NUM_NAMES) ** 0.5


def test_no_two_purposes_or_indices_share_their_random_numbers() -> None:
    indices = [(), (0,), (1,), (0, 0), (0, 1)]
    drawn = {
        random_generator(seed, purpose, *path).random() for seed in (0, 1) for purpose in Purpose for path in indices
    }
    assert len(drawn) == 2 * len(Purpose) * len(indices)


# The table.


@pytest.mark.parametrize(
    ("name", "options", "answer"),
    [
        ("fact", {}, "unknown generator 'fact'; did you mean 'facts'\\? generators: facts, questions, "),
        ("facts", {"tempate": 1}, "unknown option of facts: 'tempate'; did you mean 'template'\\? options: template"),
        ("questions", {"template": 1}, "unknown option of questions: 'template'; options: none"),
        ("facts", {"template": 4}, "0 <= template < 4 must hold, but got template=4"),
        ("facts", {"template": -1}, "0 <= template < 4 must hold, but got template=-1"),
        ("facts", {"template": 1.0}, "option template must be of type int, but got 1.0"),
        ("facts", {"template": True}, "option template must be of type int, but got True"),
        (
            "facts",
            {"num_templates": 0},
            "1 <= num_templates <= 4 must hold from template 0 .* got num_templates=0",
        ),
        (
            "facts",
            {"num_templates": 5},
            "1 <= num_templates <= 4 must hold from template 0 .* got num_templates=5",
        ),
        (
            "facts",
            {"template": 2, "num_templates": 3},
            "1 <= num_templates <= 2 must hold from template 2 .* num_templates=3",
        ),
        ("biographies", {"num_templates": 0}, "1 <= num_templates <= 8 .* must hold, but got num_templates=0"),
        ("biographies", {"num_templates": 9}, "1 <= num_templates <= 8 .* must hold, but got num_templates=9"),
        ("biographies", {"num_sentences": 1}, "2 <= num_sentences <= 4 must hold, but got .* num_sentences=1"),
        ("biographies", {"num_sentences": 5}, "2 <= num_sentences <= 4 must hold, but got .* num_sentences=5"),
        ("puzzles", {"num_inhabitants": 1}, "2 <= num_inhabitants <= 4 must hold, but got num_inhabitants=1"),
        ("puzzles", {"num_inhabitants": 5}, "2 <= num_inhabitants <= 4 must hold, but got num_inhabitants=5"),
        ("overlapping", {"prefix_overlap": "hihg"}, "unknown prefix_overlap 'hihg'; did you mean 'high'\\?"),
        ("overlapping", {"continuation_overlap": "no"}, "unknown continuation_overlap 'no'"),
        ("overlapping", {"prefix_overlap": 1}, "unknown prefix_overlap '1'; choices: low, high"),
        ("frequencies", {"skew": -0.1}, "0 <= skew <= 4 must hold, but got skew=-0.1"),
        ("frequencies", {"skew": float("nan")}, "0 <= skew <= 4 must hold, but got skew=nan"),
        ("frequencies", {"skew": "1"}, "option skew must be of type float, but got '1'"),
    ],
)
def test_an_unknown_name_or_a_wrong_option_is_answered_with_what_must_hold(
    name: str, options: dict[str, object], answer: str
) -> None:
    with pytest.raises(ValueError, match=answer):
        generator(name, **options)


def test_a_generator_is_made_by_name_with_the_options_that_are_given() -> None:
    assert generator("frequencies", skew=1) == Frequencies(skew=1.0)
    assert generator("puzzles") == Puzzles()
    assert [type(generator(name)) for name in GENERATORS] == list(GENERATORS.values())


GOLDEN: list[tuple[Generator, str]] = [
    (Facts(template=1), "cdb6f1b234187f74"),
    (Questions(), "c9d8df47bacedfa4"),
    (Biographies(), "f6efc51e7da7d5ea"),
    (Puzzles(num_inhabitants=3), "7a542a79d8aa2b35"),
    (Overlapping(prefix_overlap="high"), "f1449d0b36e7e5b1"),
    (Frequencies(skew=1.0), "03aa1713c37e5356"),
]


@pytest.mark.parametrize(("case", "expected"), GOLDEN, ids=str)
def test_samples_never_change(case: Generator, expected: str) -> None:
    text = "\n".join(prefix + "|" + reference for prefix, reference in case.samples(120, seed=7))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected


# Facts.


def chi_square_excess(table: ndarray) -> float:
    """Pearson's statistic of independence above its expectation, in standard deviations of the chi-square law."""
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float((((table - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def contingency(pairs: Sequence[tuple[str, str]]) -> ndarray:
    rows, columns = (sorted(set(side)) for side in zip(*pairs, strict=True))
    table = np.zeros((len(rows), len(columns)))
    for row, column in pairs:
        table[rows.index(row), columns.index(column)] += 1
    return table


FACTS = fact_table(4000 * len(RELATIONS), seed=0)


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_are_equally_likely_and_tell_nothing_of_the_subject_or_of_its_next_relation(relation: str) -> None:
    # Expected counts are above 3 in every cell, where the statistic has its chi-square moments; 5 deviations.
    here = {fact.subject: fact.object for fact in FACTS if fact.relation == relation}
    following = RELATIONS[(RELATIONS.index(relation) + 1) % len(RELATIONS)]
    there = {fact.subject: fact.object for fact in FACTS if fact.relation == following}
    counts = np.array([Counter(here.values())[each] for each in objects(relation)])
    expected = len(here) / NUM_OBJECTS
    assert abs(((counts - expected) ** 2 / expected).sum() - 31) < 5 * (2 * 31) ** 0.5
    assert abs(chi_square_excess(contingency([(subject[:2], each) for subject, each in here.items()]))) < 5
    assert abs(chi_square_excess(contingency([(subject[-3:], each) for subject, each in here.items()]))) < 5
    assert abs(chi_square_excess(contingency([(here[subject], there[subject]) for subject in here]))) < 5


def test_the_chi_square_would_see_one_object_in_ten_that_the_subject_tells() -> None:
    known = {start: objects("home")[i] for i, start in enumerate(sorted({fact.subject[:2] for fact in FACTS}))}
    pairs = [(fact.subject[:2], fact.object) for fact in FACTS if fact.relation == "home"]
    told = [(start, known[start] if i % 10 == 0 else each) for i, (start, each) in enumerate(pairs)]
    assert chi_square_excess(contingency(told)) > 5


def test_each_subject_has_one_object_of_every_relation() -> None:
    table = fact_table(100 * len(RELATIONS) + 2, seed=1)
    found = Counter((fact.subject, fact.relation) for fact in table)
    assert set(found.values()) == {1}
    assert [fact.relation for fact in table[:6]] == list(RELATIONS)
    assert len({fact.subject for fact in table}) == 101
    assert all(fact.object in objects(fact.relation) for fact in table)


def test_the_templates_say_the_same_fact_in_different_words_and_end_with_the_object() -> None:
    seen: set[str] = set()
    for relation in RELATIONS:
        for template in range(NUM_TEMPLATES):
            prefix, reference = Fact("Mira Tolven", relation, objects(relation)[3]).sample(template)
            assert "Mira Tolven" in prefix
            assert reference == f" {objects(relation)[3]}."
            seen.add(prefix)
    assert len(seen) == len(RELATIONS) * NUM_TEMPLATES


def test_the_facts_do_not_depend_on_the_template() -> None:
    table = fact_table(50, seed=2)
    for template in range(NUM_TEMPLATES):
        assert Facts(template=template).samples(50, seed=2) == [fact.sample(template) for fact in table]


def test_under_several_templates_subjects_take_turns_and_a_fact_is_told_under_one() -> None:
    table, case = fact_table(3 * 6 + 2, seed=2), Facts(template=1, num_templates=2)
    by_hand = [1] * 6 + [2] * 6 + [1] * 6 + [2] * 2
    samples = case.samples(20, seed=2)
    assert [case.template_of(place) for place in range(20)] == by_hand
    assert samples == [fact.sample(template) for fact, template in zip(table, by_hand, strict=True)]
    births = [samples[0].prefix, samples[6].prefix, samples[12].prefix, samples[18].prefix]
    assert [" ".join(prefix.replace(table[6 * k].subject, "_").split()) for k, prefix in enumerate(births)] == [
        "The birthplace of _ is",
        "_ came into the world in",
        "The birthplace of _ is",
        "_ came into the world in",
    ]


def test_objects_of_a_relation_are_single_words_none_of_which_begins_another_when_said() -> None:
    for relation in RELATIONS:
        assert len(objects(relation)) == NUM_OBJECTS
        said = [Fact("Mira Tolven", relation, each).sample(0).reference for each in objects(relation)]
        assert all(len(each.split()) == 1 for each in said)
        assert not any(a != b and b.startswith(a) for a in said for b in said)


def test_what_the_table_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown relation 'birthplac'; did you mean 'birthplace'"):
        objects("birthplac")
    with pytest.raises(ValueError, match="unknown relation"):
        Fact("Mira Tolven", "shoe size", "9").sample(0)
    with pytest.raises(ValueError, match="0 <= template < 4 must hold, but got template=4"):
        Fact("Mira Tolven", "home", "Peru").sample(4)
    with pytest.raises(ValueError, match="1 <= num_facts <= 2592000 must hold"):
        fact_table(0, seed=0)


# Questions and biographies.


def test_each_thing_is_asked_about_once_and_answers_hardly_recur() -> None:
    samples = Questions().samples(3000, seed=0)
    things = {thing for prefix, _ in samples for thing in re.findall(r"the (\w+ \w+)", prefix)}
    assert len(things) == 3000
    assert things <= set(THINGS)
    assert len({reference for _, reference in samples}) > 2500
    assert all(prefix.endswith("?") and reference.endswith(".") for prefix, reference in samples)


DRAWN = {word for words in LISTS.values() for word in words} | set(GIVEN_NAMES) | set(SURNAMES)


def shape(sentence: str) -> str:
    """A sentence with a gap for each word that is drawn, which is to say its template."""
    return " ".join("_" if re.sub(r"\W", "", word) in DRAWN else word for word in sentence.split())


@pytest.mark.parametrize("num_templates", range(1, MAX_TEMPLATES + 1))
def test_as_many_templates_are_used_as_are_asked_for_at_equal_numbers_of_words(num_templates: int) -> None:
    samples = Biographies(num_templates=num_templates, num_sentences=4).samples(400, seed=0)
    for prefix, reference in samples:
        sentences = re.findall(r"[^.]+\.", prefix + reference)
        assert [len(sentence.split()) for sentence in sentences] == [8] * 4
        assert prefix == sentences[0]
    for sentence in range(4):
        shapes = {shape(re.findall(r"[^.]+\.", prefix + reference)[sentence]) for prefix, reference in samples}
        assert len(shapes) == num_templates


def test_biographies_of_less_diversity_or_length_tell_the_same_of_the_same_persons() -> None:
    def particulars(sample: Sample) -> Counter[str]:
        return Counter(word for word in re.findall(r"\w+", sample.prefix + sample.reference) if word in DRAWN)

    many, few = (Biographies(num_templates=each).samples(100, seed=0) for each in (8, 1))
    assert [particulars(sample) for sample in many] == [particulars(sample) for sample in few]
    for short, long in zip(Biographies(num_sentences=2).samples(100, seed=0), many, strict=True):
        assert short.prefix == long.prefix
        assert long.reference.startswith(short.reference)


# Puzzles.


def read_statement(text: str, kinds: dict[str, str]) -> bool:
    """What is said in a puzzle's own words, if the inhabitants are of these kinds."""
    if alike := re.fullmatch(r"(\w+) and (\w+) are of the same kind", text):
        return kinds[alike[1]] == kinds[alike[2]]
    claims = [kinds[name] == kind for name, kind in re.findall(r"(\w+) is a (knight|knave)", text)]
    if text.startswith("if "):
        antecedent, consequent = claims
        return consequent if antecedent else True
    if " and " in text:
        return claims == [True, True]
    if " or " in text:
        return True in claims
    (claim,) = claims
    return claim


@pytest.mark.parametrize("num_inhabitants", [2, 3, 4])
def test_a_puzzle_has_the_one_solution_that_its_text_allows(num_inhabitants: int) -> None:
    for prefix, reference in Puzzles(num_inhabitants=num_inhabitants).samples(100, seed=0):
        said = re.findall(r'(\w+) says: "([^"]+)\."', prefix)
        inhabitants = re.findall(r"\w+", prefix.partition(" are ")[0].replace(" and ", " "))
        assert [name for name, _ in said] == inhabitants
        assert len(set(inhabitants)) == num_inhabitants
        right = []
        for choice in itertools.product(["knight", "knave"], repeat=num_inhabitants):
            kinds = dict(zip(inhabitants, choice, strict=True))
            if all(read_statement(text, kinds) is (kinds[name] == "knight") for name, text in said):
                right.append(f" {', '.join(f'{name} is a {kind}' for name, kind in kinds.items())}.")
        assert right == [reference]


@st.composite
def statement_lists(draw: st.DrawFn) -> list[Statement]:
    num_inhabitants = draw(st.integers(1, 5))
    claims = st.builds(Claim, st.integers(0, num_inhabitants - 1), st.booleans())
    connectives: st.SearchStrategy[Connective] = st.sampled_from(["is", "same", "and", "or", "if"])
    statements = st.builds(Statement, connectives, claims, claims)
    return draw(st.lists(statements, min_size=num_inhabitants, max_size=num_inhabitants))


@given(statement_lists())
@settings(deadline=None, max_examples=60)
def test_the_solver_agrees_with_truth_tables_over_bits(statements: list[Statement]) -> None:
    truth_tables = {"is": 0b1100, "and": 0b1000, "or": 0b1110, "if": 0b1011}
    expected = set()
    for bits in range(2 ** len(statements)):
        consistent = True
        for speaker, (connective, first, second) in enumerate(statements):
            p, q = bits >> first.inhabitant & 1, bits >> second.inhabitant & 1
            if connective == "same":
                is_true = 1 - (p ^ q)
            else:
                row = 2 * (p ^ (not first.is_knight)) + (q ^ (not second.is_knight))
                is_true = truth_tables[connective] >> row & 1
            consistent &= is_true == bits >> speaker & 1
        if consistent:
            expected.add(tuple(bool(bits >> inhabitant & 1) for inhabitant in range(len(statements))))
    found = solutions(statements)
    assert set(found) == expected
    assert len(found) == len(expected)


def test_known_puzzles_are_solved() -> None:
    somebody = Claim(0, True)
    assert solutions([Statement("is", Claim(0, False), somebody)]) == []  # "I am a knave"
    assert solutions([Statement("is", somebody, somebody)]) == [(True,), (False,)]
    # Smullyan's first: A says "at least one of us is a knave".
    either = Statement("or", Claim(0, False), Claim(1, False))
    anything = Statement("or", Claim(1, True), Claim(1, False))
    assert solutions([either, Statement("is", Claim(1, True), somebody)]) == [(True, False)]
    assert solutions([either, anything]) == []


@pytest.mark.parametrize("num_inhabitants", [2, 3])
def test_all_solutions_are_equally_likely_and_all_forms_occur(num_inhabitants: int) -> None:
    samples = Puzzles(num_inhabitants=num_inhabitants).samples(400, seed=1)
    found = Counter(tuple(re.findall("knight|knave", reference)) for _, reference in samples)
    num_solutions = 2**num_inhabitants
    expected = len(samples) / num_solutions
    statistic = sum((count - expected) ** 2 / expected for count in found.values())
    assert len(found) == num_solutions
    # 5 standard deviations of the chi-square law.
    assert statistic < num_solutions - 1 + 5 * (2 * (num_solutions - 1)) ** 0.5
    text = " ".join(prefix for prefix, _ in samples)
    for form in ('says: "if ', " of the same kind", r"kn\w+ and \w+ is", r"kn\w+ or \w+ is", r'"\w+ is a kn\w+\."'):
        assert re.search(form, text)


# Overlap.

NUM_BLOCKS = 10
CORPORA = {
    arm: Overlapping(prefix_overlap=arm[0], continuation_overlap=arm[1]).samples(NUM_BLOCKS * BLOCK_SIZE, seed=0)
    for arm in ARMS
}
SIDES = (0, 1)


def jaccard_within_groups(samples: list[Sample], side: int) -> list[float]:
    words = [set(sample[side].split()) for sample in samples]
    pairs = [
        (words[i], words[j])
        for first in range(0, len(words), GROUP_SIZE)
        for i, j in itertools.combinations(range(first, first + GROUP_SIZE), 2)
    ]
    return [len(a & b) / len(a | b) for a, b in pairs]


@pytest.mark.parametrize("arm", ARMS, ids="-".join)
def test_overlap_within_groups_is_as_asked_for_on_each_side_whatever_it_is_on_the_other(
    arm: tuple[Overlap, Overlap],
) -> None:
    for side in SIDES:
        # Six of eight words in common: 6 / (8 + 8 - 6).
        expected = 0.6 if arm[side] == "high" else 0.0
        assert jaccard_within_groups(CORPORA[arm], side) == pytest.approx([expected] * (NUM_BLOCKS * 7 * 21))


def test_one_side_of_an_overlapping_corpus_does_not_depend_on_the_other_sides_overlap() -> None:
    for overlap in ("low", "high"):
        prefixes, references = (
            [[sample[side] for sample in CORPORA[arm]] for arm in ARMS if arm[side] == overlap] for side in SIDES
        )
        assert prefixes[0] == prefixes[1]
        assert references[0] == references[1]


def test_each_word_stands_equally_often_at_each_place_in_all_four_arms() -> None:
    counts = {
        arm: Counter(
            (side, place, word)
            for sample in samples
            for side in SIDES
            for place, word in enumerate(sample[side].split())
        )
        for arm, samples in CORPORA.items()
    }
    assert counts["low", "low"] == counts["low", "high"] == counts["high", "low"] == counts["high", "high"]
    assert sum(counts["low", "low"].values()) == NUM_BLOCKS * BLOCK_SIZE * 2 * NUM_WORDS


@pytest.mark.parametrize("arm", ARMS, ids="-".join)
def test_samples_of_one_block_that_are_not_to_be_alike_share_one_word_at_most(arm: tuple[Overlap, Overlap]) -> None:
    block = CORPORA[arm][BLOCK_SIZE : 2 * BLOCK_SIZE]
    for side in SIDES:
        words = [set(sample[side].split()) for sample in block]
        assert all(len(each) == NUM_WORDS for each in words)
        for i, j in itertools.combinations(range(BLOCK_SIZE), 2):
            is_alike = arm[side] == "high" and i // GROUP_SIZE == j // GROUP_SIZE
            assert is_alike or len(words[i] & words[j]) <= 1
    assert not {word for sample in block for word in sample[0].split()} & {
        word for sample in block for word in sample[1].split()
    }


def test_equal_frequencies_fix_the_mean_overlap_over_all_pairs_and_only_nearest_neighbours_differ() -> None:
    shared, nearest = {}, {}
    for arm, samples in CORPORA.items():
        index = {word: k for k, word in enumerate(WORDS)}
        is_in = np.zeros((len(samples), len(WORDS)), dtype=np.int32)
        for i, sample in enumerate(samples):
            is_in[i, [index[word] for word in sample.prefix.split()]] = 1
        overlap = is_in @ is_in.T
        np.fill_diagonal(overlap, 0)
        shared[arm], nearest[arm] = int(overlap.sum()), float(overlap.max(axis=1).mean())
    assert len(set(shared.values())) == 1
    assert nearest["high", "low"] == nearest["high", "high"] >= 6
    assert nearest["low", "low"] == nearest["low", "high"] < 3.5


# Frequencies.


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0])
def test_words_of_references_occur_at_the_rates_of_zipf(skew: float) -> None:
    num_samples = 4000
    samples = Frequencies(skew=skew).samples(num_samples, seed=0)
    counts = Counter(word for _, reference in samples for word in reference.split())
    ranked = random_generator(0, Purpose.FREQUENCY_RANKS).permutation(np.array(WORDS)).tolist()
    probabilities = np.array([rank**-skew for rank in range(1, len(WORDS) + 1)])
    probabilities /= probabilities.sum()
    num_words, num_kinds = num_samples * NUM_WORDS, len(WORDS)
    assert sum(counts.values()) == num_words
    expected = num_words * probabilities
    statistic = sum((counts[word] - mean) ** 2 / mean for word, mean in zip(ranked, expected, strict=True))
    # The exact variance of Pearson's statistic, since rare words have small expected counts; 5 deviations.
    variance = 2 * (num_kinds - 1) + ((1 / probabilities).sum() - num_kinds**2 - 2 * num_kinds + 2) / num_words
    assert abs(statistic - (num_kinds - 1)) < 5 * variance**0.5
    np.testing.assert_allclose(Frequencies(skew=skew).probabilities, probabilities, rtol=1e-12)


def test_the_skew_changes_neither_prefixes_nor_lengths_and_keeps_every_frequent_word() -> None:
    uniform, skewed = (Frequencies(skew=skew).samples(500, seed=3) for skew in (0.0, 1.5))
    assert [sample.prefix for sample in uniform] == [sample.prefix for sample in skewed]
    favourite = Counter(word for _, reference in skewed for word in reference.split()).most_common(1)[0][0]
    for a, b in zip(uniform, skewed, strict=True):
        assert len(a.reference.split()) == len(b.reference.split()) == NUM_WORDS
        for before, after in zip(a.reference.split(), b.reference.split(), strict=True):
            assert before != favourite or after == favourite, "the two must share their random numbers"


# Source.

LIBRARY = list(library_functions())


def whole(sample: Sample) -> str:
    """The function, put together again."""
    return f"{sample.prefix}\n{textwrap.indent(sample.reference.strip(), ' ' * 4)}\n"


def test_every_function_compiles_when_it_is_put_together_again_and_none_is_there_twice() -> None:
    for sample in LIBRARY:
        (function,) = ast.parse(whole(sample)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        assert sample.prefix.lstrip() == sample.prefix
        assert sample.prefix.startswith(("def ", "async def "))
        assert sample.reference[0] == "\n" != sample.reference[1], "one line end parts the two"
        assert not sample.reference[1].isspace()
        assert len(sample.reference.strip().split("\n")) in BODY_LINES
        assert (sample.prefix + sample.reference).isascii()
        assert not re.search(r"[^\S \n]|[ ]$", sample.prefix + sample.reference, re.MULTILINE)
    assert len({prefix for prefix, _ in LIBRARY}) == len({body for _, body in LIBRARY}) == len(LIBRARY)
    assert len(LIBRARY) >= PythonSource.limit >= 4000


def test_docstrings_are_left_out_and_both_parts_are_dedented() -> None:
    """Two functions of textwrap, one of a module and one of a class, as Python 3.11 to 3.14 have them."""
    fill = "\nw = TextWrapper(width=width, **kwargs)\nreturn w.fill(text)"
    munge = """
if self.expand_tabs:
    text = text.expandtabs(self.tabsize)
if self.replace_whitespace:
    text = text.translate(self.unicode_whitespace_trans)
return text"""
    expected = {"def fill(text, width=70, **kwargs):": fill, "def _munge_whitespace(self, text):": munge}
    assert {sample.prefix: sample.reference for sample in LIBRARY if sample.prefix in expected} == expected


def test_signatures_and_bodies_stand_in_the_library_line_behind_line() -> None:
    files = [path.read_text(encoding="utf-8", errors="replace") for path in library_modules()]
    library = "\n".join(line.strip() for text in files for line in text.split("\n"))
    for sample in LIBRARY[::20]:
        for part in (sample.prefix, sample.reference):
            assert "\n".join(line.strip() for line in part.strip().split("\n")) in library


def test_a_seed_decides_the_order_alone() -> None:
    one, other = (PythonSource().samples(PythonSource.limit, seed=seed) for seed in (0, 1))
    assert len(set(one)) == len(one)
    assert {*one, *other} <= {*LIBRARY}
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # one is expected


def test_a_library_without_its_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memray.generators.source.library_functions", lambda: LIBRARY[:9])
    with pytest.raises(
        ValueError, match=r"must have 4400 functions of 2 to 16 lines, but that of Python 3\S* in /\S* has 9"
    ):
        PythonSource().samples(1, seed=0)
