# SPDX-License-Identifier: Apache-2.0
"""Which experts the tokens go to: shares by layer and image scale, as numbers and as a picture.

python examples/expert_load.py --model CHECKPOINT cat.png dog.png    # of the encoder of a checkpoint
python examples/expert_load.py --log runs/mistral-7b/pft/log.jsonl   # of the last line of a training run's log
python examples/expert_load.py                                       # of a tiny random encoder and a drawn picture
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from cumo import CuMoConfig, CuMoProcessor, CuMoVisionModel
from cumo.models.pictures import to_rgb
from cumo.models.processor import clip_image_processor
from cumo.nn import expert_load

Loads = dict[str, dict[str, list[float]]]  # panel -> layer -> the share of each expert


def drawn_picture() -> Image.Image:
    """A sun over a hill."""
    picture = Image.new("RGB", (56, 40), "lightskyblue")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((36, 4, 50, 18), fill="gold")
    draw.polygon([(0, 40), (24, 16), (56, 40)], fill="seagreen")
    return picture


def loads_of_encoder(folder: str | None, pictures: list[Path]) -> Loads:
    """The loads of all pictures together, by image scale."""
    images = [to_rgb(path) for path in pictures] or [drawn_picture()]
    if folder is None:
        torch.manual_seed(0)
        tower = CuMoVisionModel(CuMoConfig.from_preset("tiny").vision_config)
        pixels = clip_image_processor(tower.config.encoder_config.image_size)(images, return_tensors="pt")
    else:
        tower = CuMoVisionModel.from_pretrained(folder)  # out of a whole model, of either layout
        pixels = CuMoProcessor.from_pretrained(folder)(images, return_tensors="pt")
    if not tower.config.is_moe:
        raise SystemExit(f"{folder}: expected an encoder with experts, got a dense one")
    with torch.no_grad():
        output = tower.eval()(**pixels)
    loads: Loads = {}
    begin, tiles = 0, sum(output.tiles_per_scale)
    for scale, count in zip(tower.config.scales, output.tiles_per_scale, strict=True):
        panel = loads.setdefault(f"encoder, scale {scale}", {})
        for layer, routing in enumerate(output.routings):
            of_scale = routing.expert_TK.unflatten(0, (tiles, -1))[begin : begin + count].flatten(0, 1)
            share = expert_load(routing._replace(expert_TK=of_scale), tower.config.num_experts)
            panel[str(layer)] = share.tolist()
        begin += count
    return loads


def loads_of_log(path: Path) -> Loads:
    """The loads in the last line of a log that has any."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = next((line["expert_load"] for line in reversed(lines) if line.get("expert_load")), None)
    if found is None:
        raise SystemExit(f"{path}: expected lines with expert_load, got none")
    loads: Loads = {}
    for layer, scales in found.get("vision", {}).items():
        for scale, share in scales.items():
            loads.setdefault(f"encoder, scale {scale}", {})[layer] = share
    if "connector" in found:
        loads["connector"] = {"0": found["connector"]}
    if "text" in found:
        loads["language model"] = found["text"]
    return loads


def evenness(share: list[float]) -> float:
    """Entropy, as a share of that of an even load."""
    return -sum(part * math.log(part) for part in share if part > 0) / math.log(len(share))


def plot(loads: Loads, target: Path) -> None:
    """A panel for each part and scale, a bar for each layer; a dotted line stands where even loads would end."""
    heights = [max(len(layers), 2) for layers in loads.values()]
    figure, panels = plt.subplots(
        len(loads), figsize=(7, 1.2 + 0.25 * sum(heights) + 0.6 * len(loads)), height_ratios=heights, squeeze=False
    )
    for axes, (name, layers) in zip(panels[:, 0], loads.items(), strict=True):
        experts = len(next(iter(layers.values())))
        left = [0.0] * len(layers)
        for expert in range(experts):
            shares = [share[expert] for share in layers.values()]
            colour = plt.get_cmap("tab20")(expert) if experts <= 20 else plt.get_cmap("turbo")(expert / experts)
            axes.barh(range(len(layers)), shares, left=left, color=colour)
            left = [done + share for done, share in zip(left, shares, strict=True)]
            axes.axvline((expert + 1) / experts, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=name, ylabel="layer", xlim=(0, 1), yticks=range(len(layers)), yticklabels=list(layers))
    panels[-1, 0].set_xlabel("share of the choices; expert 0 is the leftmost")
    figure.tight_layout()
    figure.savefig(target, dpi=150)


def main() -> None:
    """Collect, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, help="for the encoder; one is drawn by default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="folder or name on the hub; a tiny random encoder by default")
    source.add_argument("--log", type=Path, help="log.jsonl of a training run")
    parser.add_argument("--output", type=Path, default=Path("expert_load.png"), help="picture to write")
    arguments = parser.parse_args()
    loads = (
        loads_of_encoder(arguments.model, arguments.pictures) if arguments.log is None else loads_of_log(arguments.log)
    )
    for name, layers in loads.items():
        for layer, share in layers.items():
            shown = [round(part, 3) for part in share]
            print(f"{name}, layer {layer}: {shown}, evenness {evenness(share):.3f} of 1")
    plot(loads, arguments.output)


if __name__ == "__main__":
    main()
