# SPDX-License-Identifier: Apache-2.0
"""Options that fit, and errors that name the field of those that do not."""

import pytest
import torch

from cumo.inference import GenerationOptions
from cumo.inference.loading import quantization_config, resolve_device, resolve_dtype


def test_defaults_and_a_single_stop_string():
    assert GenerationOptions() == GenerationOptions(512, 0.0, 1.0, (), None)
    assert GenerationOptions(stop="a").stop == ("a",)
    assert GenerationOptions(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive integer, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a positive integer, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a positive integer, got True"),
        ({"temperature": -0.1}, "temperature: expected a number from 0 to 100, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number from 0 to 100, got nan"),
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 100, got 'hot'"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and up to 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0 and up to 1, got 1.1"),
        ({"stop": [""]}, "stop: expected strings that are not empty"),
        ({"stop": [3]}, "stop: expected strings that are not empty"),
        ({"stop": 3}, "stop: expected strings that are not empty, got 3"),
        ({"stop": ["a"] * 17}, "stop: expected up to 16 strings, got 17"),
        ({"seed": 0.5}, "seed: expected an integer of 64 bits or None, got 0.5"),
        ({"seed": 2**64}, "seed: expected an integer of 64 bits or None, got"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


def test_dtypes_and_devices():
    assert resolve_dtype("auto") == "auto"
    assert resolve_dtype("bfloat16") is resolve_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(ValueError, match="dtype: expected one of .* got 'int8'"):
        resolve_dtype("int8")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected a device such as cpu or cuda:0, got 'gpu'"):
        resolve_device("gpu")


def test_unknown_quantization():
    with pytest.raises(ValueError, match=r"quantization: expected one of \['int8', 'nf4'\] or None, got 'int2'"):
        quantization_config("int2")
