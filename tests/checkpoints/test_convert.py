# SPDX-License-Identifier: Apache-2.0
"""Conversion between the layouts, by command and in a stream: bit by bit, or an error and no target."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="whole checkpoints are of models of transformers")

from safetensors.torch import load_file, save_file

from cumo.checkpoints.convert import convert_to_native, convert_to_published
from cumo.checkpoints.files import open_folder
from cumo.cli import main
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.models.prompts import chat_template
from tests.data.samples import byte_processor
from tests.inference.tiny import tokenizer_model
from tests.numerics import assert_bitwise_equal, relative_error

WEIGHTS = "model.safetensors"


def copied(folder, target):
    """A copy that a test may spoil."""
    shutil.copytree(folder, target)
    return target


def rewrite(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_the_command_goes_both_ways(native, tmp_path, capsys):
    published, back = tmp_path / "published", tmp_path / "back"
    assert main(["convert", str(native), str(published), "--to", "published", "--max-shard-gb", "2e-5"]) == 0
    assert (published / f"{WEIGHTS}.index.json").is_file()
    assert json.loads((published / "config.json").read_text())["model_type"] == f"llava_{native.name}"
    assert main(["convert", str(published), str(back), "--to", "native"]) == 0
    assert f"{back}: written in the native layout" in capsys.readouterr().out
    assert_bitwise_equal(dict(open_folder(back)), dict(open_folder(native)))
    assert json.loads((back / "config.json").read_text())["model_type"] == "cumo"


@pytest.mark.parametrize("kind", ["a tokenizer.json alone", "another chat template", "as published"])
def test_the_processor_goes_both_ways(kind, native, tmp_path):
    source = copied(native, tmp_path / "source")
    if kind == "a tokenizer.json alone":
        processor = byte_processor(image_seq_length=9)
    else:
        shutil.copyfile(tokenizer_model(), source / "tokenizer.model")
        convert_to_published(source, tmp_path / "without")
        processor = CuMoProcessor.from_pretrained(tmp_path / "without")
    if kind == "another chat template":
        processor.chat_template = chat_template("llava_v1")
    processor.save_pretrained(source)
    convert_to_published(source, tmp_path / "published")
    assert (tmp_path / "published" / "processor_config.json").is_file() == (kind != "as published")
    convert_to_native(tmp_path / "published", tmp_path / "back")
    for folder in ("published", "back"):
        loaded = CuMoProcessor.from_pretrained(tmp_path / folder)
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        assert loaded.tokenizer("Why? <image>")["input_ids"] == processor.tokenizer("Why? <image>")["input_ids"]


def test_saved_loaded_and_saved_again_the_files_are_the_same(native, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    CuMoForConditionalGeneration.from_pretrained(native).save_pretrained(first)
    CuMoForConditionalGeneration.from_pretrained(first).save_pretrained(second)
    for name in ("config.json", WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_converted_again_the_published_files_are_the_same(published, tmp_path):
    native, again = tmp_path / "native", tmp_path / "again"
    convert_to_native(published, native)
    convert_to_published(native, again)
    for name in ("config.json", WEIGHTS):
        assert (published / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.parametrize("layout", ["safetensors shards", "bin", "bin shards"])
def test_published_files_of_every_kind_are_read(published, layout, tmp_path):
    folder = copied(published, tmp_path / "source")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save, ending = (save_file, "safetensors") if layout.startswith("safetensors") else (torch.save, "bin")
        base = "model.safetensors" if ending == "safetensors" else "pytorch_model.bin"
        where = {name: f"part-{index % 3}.{ending}" for index, name in enumerate(tensors)}
        for file in set(where.values()):
            save({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
        (folder / f"{base}.index.json").write_text(json.dumps({"weight_map": where}))
    convert_to_native(folder, tmp_path / "target")
    convert_to_native(published, tmp_path / "expected")
    for load in (lambda path: dict(open_folder(path)), CuMoForConditionalGeneration.from_pretrained):
        found, expected = load(tmp_path / "target"), load(tmp_path / "expected")
        if not isinstance(found, dict):
            found, expected = CuMoForConditionalGeneration.from_pretrained(folder).state_dict(), expected.state_dict()
        assert_bitwise_equal(found, expected)


def drop(tensors):
    del tensors[next(name for name in tensors if name.endswith("gate.weight") and "layers" not in name)]


def add(tensors):
    tensors[next(iter(tensors)).split(".")[0] + ".stray.weight"] = torch.zeros(2)


def reshape(tensors):
    tensors[next(name for name in tensors if name.endswith("norm.weight") and "layers" not in name)] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop, r"gate\.weight"), (add, r"unexpected \['.*stray\.weight'\]"), (reshape, r"norm\.weight: \[3\] for \[32\]")],
    ids=["missing", "unexpected", "shape"],
)
@pytest.mark.parametrize("layout", ["native", "published"])
def test_tensors_that_do_not_fit_are_listed(change, message, layout, native, published, tmp_path):
    """By conversion, which leaves no target, and by loading, which initialises nothing; both name the layout."""
    folder = native if layout == "native" else published
    source = copied(folder, tmp_path / "source")
    rewrite(source, change)
    to_other = convert_to_published if layout == "native" else convert_to_native
    with pytest.raises(ValueError, match=message) as converting:
        to_other(source, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    with pytest.raises(ValueError, match=message) as loading:
        CuMoForConditionalGeneration.from_pretrained(source)
    for raised in (converting, loading):
        assert repr("cumo" if layout == "native" else f"llava_{folder.name}") in str(raised.value)


def test_a_truncated_file_leaves_no_target(native, tmp_path, capsys):
    source = copied(native, tmp_path / "source")
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "published"]) == 2
    assert "expected a whole file of tensors, got a truncated or damaged one" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_existing_target_is_left_alone(native, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    assert main(["convert", str(native), str(tmp_path / "target"), "--to", "published"]) == 2
    assert "expected a folder that does not exist yet" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "found no such file"), ("{", "expected JSON"), ('{"model_type": "bert"}', "got 'bert'")],
    ids=["none", "broken", "other"],
)
def test_folders_that_are_no_checkpoint(content, message, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    if content is not None:
        (source / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_to_native(source, tmp_path / "target")


def adapter_of(published, folder, rank=2, alpha=3):
    """A LoRA folder as the published training leaves it, and the tensors that it makes of its base."""
    folder.mkdir()
    tensors = load_file(published / WEIGHTS)
    config = json.loads((published / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(published / "vision_tower")}))
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": alpha}))
    merged, adapter = dict(tensors), {}
    for name, weight in tensors.items():
        if name.endswith(("self_attn.q_proj.weight", "self_attn.v_proj.weight")) and "vision" not in name:
            a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
            key = "base_model.model." + name.removesuffix(".weight")
            adapter |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            merged[name] = weight + alpha / rank * b @ a
    save_file(adapter, folder / "adapter_model.safetensors")
    trained = {name: torch.randn_like(tensor) for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in trained.items()}, folder / "non_lora_trainables.bin"
    )
    return merged | trained


def test_published_adapters_are_merged(published, tmp_path):
    expected = adapter_of(published, tmp_path / "adapter")
    convert_to_native(tmp_path / "adapter", tmp_path / "native", base=published)
    convert_to_published(tmp_path / "native", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], expected[name]) <= 1e-6 for name in expected)
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "adapter", model_base=published)
    assert_bitwise_equal(model.state_dict(), dict(open_folder(tmp_path / "native")))
    with pytest.raises(ValueError, match="model_base: expected the folder of the model that"):
        convert_to_native(tmp_path / "adapter", tmp_path / "other")


# Anonymous memory is what a machine must have; of mapped files it holds as much as it likes.
PEAK = """
import sys, threading, time
from pathlib import Path
from cumo.checkpoints.convert import convert_to_native, convert_to_published

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

peak = start = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
convert = {"native": convert_to_native, "published": convert_to_published}[sys.argv[1]]
convert(Path(sys.argv[2]), Path(sys.argv[3]), max_shard_bytes=int(sys.argv[4]))
done.set()
watcher.join()
print(peak - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_is_bounded_by_the_shard_not_by_the_checkpoint(tmp_path):
    """A made-up model of 10 shards goes both ways in the memory of two."""
    from tests.models.tiny import tiny_config

    shard = 30 * 10**6
    text = {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 1536, "num_attention_heads": 4}
    model = CuMoForConditionalGeneration(tiny_config(text_type="mistral", text=text))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 4 * shard
    model.save_pretrained(tmp_path / "0", max_shard_size=shard)
    del model
    for step, layout in enumerate(("published", "native")):
        command = [sys.executable, "-c", PEAK, layout, tmp_path / str(step), tmp_path / str(step + 1), str(shard)]
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        assert int(result.stdout) <= 2.5 * shard < size, f"{layout}: {int(result.stdout) / shard:.2f} shards"
    assert_bitwise_equal(dict(open_folder(tmp_path / "2")), dict(open_folder(tmp_path / "0")))
