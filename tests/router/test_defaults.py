"""What a model's `generation_config.json` advises."""

import json

import pytest

from kvferry.common.errors import ConfigError
from kvferry.router.defaults import NO_DEFAULTS, SamplingDefaults, load_defaults


def test_what_is_advised_is_taken(tmp_path):
    assert load_defaults(str(tmp_path)) == NO_DEFAULTS == SamplingDefaults()
    told = {"temperature": 0.7, "top_k": 20, "top_p": None, "eos_token_id": [1, 2], "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert load_defaults(str(tmp_path)) == SamplingDefaults(temperature=0.7, top_k=20)


@pytest.mark.parametrize("text", ["{", "[]", '{"temperature": "hot"}', '{"top_p": 2}', '{"top_k": 1.5}'])
def test_a_broken_one_is_told_of(text, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json is not valid: "):
        load_defaults(str(tmp_path))
