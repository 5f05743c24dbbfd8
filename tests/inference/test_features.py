# SPDX-License-Identifier: Apache-2.0
"""The cache of picture embeddings: its limit, its order, its keys."""

import pytest
import torch

from cumo.inference.features import FeatureCache, picture_key
from tests.inference.tiny import picture


def test_the_least_recently_used_go_first():
    cache = FeatureCache(max_bytes=12)
    tensors = {key: torch.full((1,), float(index)) for index, key in enumerate((b"a", b"b", b"c", b"d"))}
    for key in (b"a", b"b", b"c"):
        cache.put(key, tensors[key])
    assert cache.get(b"a") is tensors[b"a"]
    cache.put(b"d", tensors[b"d"])
    assert cache.get(b"b") is None
    assert [cache.get(key) is tensors[key] for key in (b"a", b"c", b"d")] == [True] * 3
    assert (cache.bytes, len(cache), cache.hits, cache.misses) == (12, 3, 4, 1)
    cache.put(b"a", tensors[b"a"])
    assert cache.bytes == 12
    cache.put(b"large", torch.zeros(4))
    assert len(cache) == 3
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)


def test_keys_tell_pictures_apart():
    keys = [
        picture_key(image)
        for image in (
            picture(0),
            picture(1),
            picture(0).resize((20, 30)),
            picture(0).convert("L"),
            picture(0, 10, 6),
            picture(0, 6, 10),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert picture_key(picture(0)) == picture_key(picture(0))


def test_a_negative_limit():
    with pytest.raises(ValueError, match="max_bytes: expected 0 or more, got -1"):
        FeatureCache(-1)
