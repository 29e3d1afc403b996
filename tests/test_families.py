"""The family table against the models that transformers builds from it, on the meta device.

The parameter counts of the public sizes are the published ones, so both shapes and counts are tested.
"""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memray.families import FAMILIES, Family, family, size

SIZES = [(name, each) for name, known in FAMILIES.items() for each in known.sizes]


def config_of(family_name: str, size_name: str) -> Any:
    known = family(family_name)
    return getattr(transformers, known.config_class)(**known.config_arguments(known.sizes[size_name]))


@pytest.mark.parametrize(("family_name", "size_name"), SIZES)
def test_a_size_has_exactly_the_parameters_that_the_table_says(family_name: str, size_name: str):
    known, shape = family(family_name), size(family_name, size_name)
    config = config_of(family_name, size_name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == shape.vocab_size
    head = model.get_output_embeddings().weight
    assert (head is embedding) is known.ties_embeddings
    assert (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.max_position_embeddings,
    ) == (
        shape.num_layers,
        shape.hidden_size,
        shape.num_heads,
        shape.max_positions,
    )


def test_the_table_holds_every_public_size():
    pythia = ["14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"]
    deduped = [f"{name}-deduped" for name in pythia[2:]]
    assert {name: set(known.sizes) - {"tiny", "tiny-text"} for name, known in FAMILIES.items()} == {
        "pythia": {*pythia, *deduped},
        "phi": {"1", "1.5", "2"},
        "llama2": {"7b", "13b"},
        "llama3": {"8b"},
        "mistral": {"7b"},
        "gpt2": {"124m", "355m", "774m", "1.5b"},
        "opt": {"125m", "350m", "1.3b", "2.7b", "6.7b", "13b"},
    }


@pytest.mark.parametrize("known", FAMILIES.values(), ids=lambda known: known.name)
def test_every_family_has_tiny_sizes_of_four_layers_by_128_that_need_no_hub(known: Family):
    for tiny in (known.sizes["tiny"], known.sizes["tiny-text"]):
        assert (tiny.num_layers, tiny.hidden_size, tiny.num_heads, tiny.max_positions) == (4, 128, 4, 2048)
        assert tiny.hub_id is None
        assert tiny.revision is None


@pytest.mark.parametrize("known", FAMILIES.values(), ids=lambda known: known.name)
def test_every_public_size_names_a_pinned_revision_of_its_own_repository(known: Family):
    public = [each for name, each in known.sizes.items() if not name.startswith("tiny")]
    assert all(each.revision not in (None, "main") for each in public)
    assert len({each.hub_id for each in public}) == len(public)


@pytest.mark.parametrize(("family_name", "public"), [("llama3", "8b"), ("mistral", "7b")])
def test_heads_share_keys_and_values_in_every_size_of_a_grouped_family(family_name: str, public: str):
    shared = {name: config_of(family_name, name).num_key_value_heads for name in family(family_name).sizes}
    assert shared == {"tiny": 2, "tiny-text": 2, public: 8}


def test_where_nothing_is_said_as_many_heads_have_keys_and_values_as_have_queries():
    for name, shape in family("llama2").sizes.items():
        assert shape.num_key_value_heads is None
        assert config_of("llama2", name).num_key_value_heads == shape.num_heads


def test_mistral_sees_a_window_and_llama3_rotates_as_published():
    windows = {name: config_of("mistral", name).sliding_window for name in family("mistral").sizes}
    assert windows == {"tiny": 16, "tiny-text": 16, "7b": 4096}
    assert config_of("llama3", "8b").rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_tiny_models_of_separate_embeddings_have_about_as_many_parameters_as_each_other():
    separate = [known.sizes["tiny"].num_parameters for known in FAMILIES.values() if not known.ties_embeddings]
    assert max(separate) < 1.01 * min(separate)


def test_only_llama_mistral_and_opt_start_with_bos_and_take_the_lower_rate():
    assert {name for name, known in FAMILIES.items() if known.bos} == {"llama2", "llama3", "mistral", "opt"}
    assert {name: known.learning_rate for name, known in FAMILIES.items()} == {
        "pythia": 1e-5,
        "phi": 1e-5,
        "llama2": 5e-6,
        "llama3": 5e-6,
        "mistral": 5e-6,
        "gpt2": 1e-5,
        "opt": 5e-6,
    }


def test_an_unknown_family_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown model family") as raised:
        family("pythai")
    assert str(raised.value) == (
        "unknown model family 'pythai'; did you mean 'pythia'? "
        "families: gpt2, llama2, llama3, mistral, opt, phi, pythia"
    )


def test_an_unknown_size_is_answered_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown size") as raised:
        size("gpt2", "125m")
    assert str(raised.value) == (
        "unknown size of gpt2 '125m'; did you mean '124m'? sizes: tiny, tiny-text, 124m, 355m, 774m, 1.5b"
    )
