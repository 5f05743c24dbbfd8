# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any bytes: a model, or an error that names the file; nothing is run, nothing half-written is left."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file

from cumo import CuMoForConditionalGeneration
from cumo.checkpoints.convert import convert_to_published
from cumo.cli import main
from cumo.inference import CuMoPipeline
from cumo.models.processor import CuMoProcessor
from tests.data.samples import byte_processor
from tests.fuzz.mutate import RANDOM, as_json, cases, damaged, mutated
from tests.inference.tiny import tokenizer_model
from tests.models.tiny import tiny_model

KINDS = ("native", "dense", "published", "bin", "adapter", "shards")


class Opened:
    """Unpickling it would leave a trace."""

    trace = Path("unpickled")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def make(folder: Path) -> Path:
    """One checkpoint of each kind."""
    torch.manual_seed(0)
    size = byte_processor().tokenizer
    text = {"vocab_size": len(size), "bos_token_id": 1, "eos_token_id": 2}
    model = tiny_model(text_type="mistral", text=text, image_token_id=len(size) - 1)
    model.save_pretrained(folder / "native")
    byte_processor(12, 9).save_pretrained(folder / "native")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    byte_processor(12, 9).save_pretrained(folder / "shards")
    dense = {"vision": {"num_experts": 1, "num_experts_per_tok": 1}, "connector_num_experts": 1}
    tiny_model(text_type="mistral", text=text, connector_num_experts_per_tok=1, **dense).save_pretrained(
        folder / "dense"
    )
    convert_to_published(folder / "native", folder / "published")
    shutil.copytree(folder / "published", folder / "bin")
    tensors = load_file(folder / "bin" / "model.safetensors")
    (folder / "bin" / "model.safetensors").unlink()
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    torch.save(
        {"model.mm_projector.gate.weight": tensors["model.mm_projector.gate.weight"]},
        folder / "bin" / "mm_projector.bin",
    )
    with contextlib.suppress(pytest.skip.Exception):
        shutil.copyfile(tokenizer_model(), folder / "published" / "tokenizer.model")
    _adapter(folder, model)
    return folder


def _adapter(folder: Path, model: Any) -> None:
    from safetensors.torch import save_file

    target = folder / "adapter"
    target.mkdir()
    shutil.copyfile(folder / "native" / "config.json", target / "config.json")
    name = "language_model.model.layers.0.self_attn.q_proj"
    rows, columns = model.get_parameter(f"{name}.weight").shape
    pair = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, columns)}
    pair[f"base_model.model.{name}.lora_B.weight"] = torch.ones(rows, 2)
    save_file(pair, target / "adapter_model.safetensors")
    gate = "connector.projection.gate.weight"
    save_file({gate: model.state_dict()[gate].clone()}, target / "trained.safetensors")
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "base_model_name_or_path": str(folder / "native")}
    (target / "adapter_config.json").write_text(json.dumps(config))


def _spoil_header(raw: bytes, random: Random) -> bytes:
    """The header of a .safetensors file mutated, its length kept true or not."""
    size = int.from_bytes(raw[:8], "little")
    header = as_json(mutated(json.loads(raw[8 : 8 + size]), random, most=2), random, True)
    told = random.choice([len(header)] * 4 + [0, 2**63, len(header) + 1, 10**9])
    return told.to_bytes(8, "little") + header + raw[8 + size :]


def _spoil_pickle(raw: bytes, random: Random) -> bytes:
    """Something else in a .bin file: what would be run, what is no tensor, an old format."""
    file = io.BytesIO()
    value = random.choice([Opened(), {"a": Opened()}, [1], {"a": 1}, {1: torch.ones(1)}, torch.ones(2), {}, None])
    if random.randrange(3) == 0:
        return pickle.dumps(value)
    torch.save(value, file, _use_new_zipfile_serialization=bool(random.randrange(2)))
    return file.getvalue() if random.randrange(2) else damaged(raw, random)


def _spoil_tensors(path: Path, random: Random) -> None:
    """Tensors gone, renamed, of another shape or dtype, or not finite."""
    from safetensors.torch import save_file

    tensors = load_file(path)
    name = random.choice([*tensors])
    tensor = tensors.pop(name)
    kind = random.randrange(7)
    if kind == 1:
        tensors[random.choice([name + "x", "a", "", "../" + name, name.replace("0", "7")])] = tensor
    elif kind == 2:
        tensors[name] = tensor.flatten()
    elif kind == 3:
        tensors[name] = tensor.to(random.choice([torch.int8, torch.bool, torch.float64, torch.float16]))
    elif kind == 4:
        tensors[name] = tensor[:0].clone()
    elif kind == 5:
        tensors[name] = torch.zeros(())
    elif kind == 6:
        tensors[name] = torch.full_like(tensor, float("nan"))
    save_file(tensors, path)


def spoil(folder: Path, random: Random) -> str:
    """Spoil one file; its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix == ".json"]
    path = random.choice(texts if random.randrange(2) else files)
    raw, kind = path.read_bytes(), random.randrange(12)
    if kind == 0:
        path.unlink()
        if random.randrange(2):
            path.mkdir()
        elif random.randrange(2):
            path.symlink_to(path)
    elif path.suffix == ".safetensors":
        if kind <= 4:
            _spoil_tensors(path, random)
        else:
            path.write_bytes(_spoil_header(raw, random) if kind <= 9 else damaged(raw, random))
    elif path.suffix == ".bin":
        path.write_bytes(_spoil_pickle(raw, random))
    elif path.suffix == ".json" and kind < 11:
        path.write_bytes(as_json(mutated(json.loads(raw), random), random))
    else:
        path.write_bytes(damaged(raw, random))
    return path.name


def load(folder: Path, random: Random) -> None:
    """A model by one of the doors."""
    door = random.randrange(3)
    if door == 0:
        CuMoForConditionalGeneration.from_pretrained(folder)
    elif door == 1:
        CuMoProcessor.from_pretrained(folder)
    else:
        CuMoPipeline.from_pretrained(folder, device="cpu")


def run(*words: object) -> tuple[int, str]:
    """Exit code and errors of a command."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(word) for word in words])
    return code, err.getvalue()


def command(folder: Path, target: Path, random: Random) -> None:
    """One of the commands that write checkpoints."""
    words = random.choice(
        [
            ("convert", folder, target, "--to", "native"),
            ("convert", folder, target, "--to", "published"),
            ("convert", folder, target, "--merge-lora"),
            ("upcycle", folder, target, "--vision", 4, "--connector", 4),
            ("upcycle", folder, target, "--text", 2),
            ("export-vllm", folder, target),
        ]
    )
    code, err = run(*words)
    last = err.strip().splitlines()[-1:] or [""]
    assert code in (0, 2)
    assert (code == 0) == target.is_dir(), (words, err)
    assert code == 0 or any(line.startswith(f"cumo {words[0]}: error: ") for line in err.splitlines()), last
    assert not list(target.parent.glob(f".{target.name}*")), "something half-written is left"


_MADE: list[Path] = []


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Made once."""
    return make(tmp_path_factory.mktemp("fuzzed"))


def check_checkpoint(random: Random, made: Path | None = None) -> None:
    """One file of a checkpoint is spoilt."""
    if made is None:
        if not _MADE:
            _MADE.append(make(Path(tempfile.mkdtemp())))
        made = _MADE[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / random.choice(["model", "a model", "mödel"])
        shutil.copytree(made / random.choice(KINDS), folder)
        Opened.trace = Path(name) / "unpickled"
        spoil(folder, random)
        if random.randrange(3):
            try:
                load(folder, random)
            except (ValueError, OSError) as error:
                assert str(error).strip()
                assert len(str(error)) < 20_000
        else:
            command(folder, Path(name) / "target", random)
        assert not Opened.trace.exists(), "the pickle was run"


@cases(0.6)
@given(random=RANDOM)
def test_checkpoints(checkpoints, random):
    check_checkpoint(random, checkpoints)


def _changed(folder: Path, target: Path, file: str, path: tuple[str, ...], value: Any) -> Path:
    """A copy with another value in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text())
    owner = content
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = value
    (target / file).write_text(json.dumps(content))
    return target


HUGE = [
    (("text_config", "vocab_size"), 2**31),
    (("text_config", "num_hidden_layers"), 2**31),
    (("text_config", "intermediate_size"), 2**24),
    (("text_config", "head_dim"), 2**30),
    (("vision_config", "num_experts"), 2**20),
    (("vision_config", "encoder_config", "num_hidden_layers"), 10**6),
    (("vision_config", "encoder_config", "image_size"), 10**6),
    (("connector_num_experts",), 10**7),
]
WRONG = [
    (("text_config", "vocab_size"), "many"),
    (("text_config", "hidden_size"), None),
    (("text_config", "hidden_size"), -32),
    (("text_config", "dtype"), "int99"),
    (("text_config",), [1]),
    (("vision_config", "encoder_config", "patch_size"), 0),
    (("vision_config", "encoder_config", "num_attention_heads"), 0),
    (("vision_config", "scales"), {"a": 1}),
    (("vision_config", "feature_layer"), "last"),
    (("connector_num_experts_per_tok",), 2.5),
    (("image_token_id",), "x"),
    (("dtype",), ["float32"]),
]


@pytest.mark.parametrize(("path", "value"), [*HUGE, *WRONG], ids=lambda value: str(value)[:60])
def test_configurations_that_do_not_fit(checkpoints, tmp_path, path, value):
    """They are told before memory is taken for what they describe."""
    folder = _changed(checkpoints / "native", tmp_path / "model", "config.json", path, value)
    with pytest.raises((ValueError, OSError), match="model"):
        CuMoForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("value", [None, "2", 0, -1, True, [2], 1e300])
@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_adapters_of_no_rank(checkpoints, tmp_path, key, value):
    folder = _changed(checkpoints / "adapter", tmp_path / "model", "adapter_config.json", (key,), value)
    with pytest.raises(ValueError, match=f"adapter_config.json: {key}: expected a positive number"):
        CuMoForConditionalGeneration.from_pretrained(folder)


def test_an_adapter_of_another_shape(checkpoints, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(checkpoints / "adapter", tmp_path / "model")
    pair = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor[:, :1].clone() for name, tensor in pair.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected A and B whose product is .*q_proj.weight"):
        CuMoForConditionalGeneration.from_pretrained(folder)
    code, err = run("convert", folder, tmp_path / "target", "--merge-lora")
    assert code == 2 and "expected A and B whose product is" in err
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".target*"))


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 20_000, b"\xff\xfe", b"null", b'{"a": NaN'])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_that_is_none(checkpoints, tmp_path, file, content):
    folder = shutil.copytree(checkpoints / "native", tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises((ValueError, OSError), match="model"):
        CuMoPipeline.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x0a\x02\x08\x01"])
def test_a_tokenizer_that_is_none(checkpoints, tmp_path, content):
    folder = shutil.copytree(checkpoints / "published", tmp_path / "model")
    (folder / "processor_config.json").unlink()  # without which a processor is made of the tokenizer.model
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model: expected a SentencePiece tokenizer.model"):
        CuMoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("value", [Opened(), {"model.norm.weight": Opened()}], ids=["whole", "within"])
def test_pickles_are_not_run(checkpoints, tmp_path, monkeypatch, value):
    monkeypatch.setattr(Opened, "trace", tmp_path / "unpickled")
    folder = shutil.copytree(checkpoints / "bin", tmp_path / "model")
    torch.save(value, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        CuMoForConditionalGeneration.from_pretrained(folder)
    assert not Opened.trace.exists()


def test_a_configuration_that_fits_no_model_when_converting(checkpoints, tmp_path):
    folder = _changed(checkpoints / "native", tmp_path / "model", "config.json", ("text_config", "hidden_act"), "x")
    code, err = run("upcycle", folder, tmp_path / "target", "--text", 2)
    assert code == 2 and "cumo upcycle: error: " in err and str(folder) in err
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".target*"))
