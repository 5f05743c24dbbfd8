# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.end_to_end`: time the whole model, with our vision side and with the published one.

Both have the same random weights, and each runs in a process of its own. The cases:

- vision: encoder and connector, inference; vision-train: the same with backward;
- train: forward and backward of the whole model on pictures with text;
- generate: prefill of pictures and prompt, then one token after the other.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import peak_bytes, time_call
from benchmarks.records import RESULTS, Row, Writer, device_name, environment, slug, table
from benchmarks.run import DTYPES
from cumo.config import CLIP_VIT_L_14_336, PRESETS, CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration

CASES = ("vision", "vision-train", "train", "generate")
VARIANTS = ("cumo", "published_loop")
# The vision side of CuMo with a small language model, where that is not what is timed.
_SMALL_TEXT = {**PRESETS["tiny"]["text_config"], "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 1}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": PRESETS["tiny"],
    "vit-l": {"vision_config": {"encoder_config": CLIP_VIT_L_14_336}, "text_config": _SMALL_TEXT},
    "7b": PRESETS["mistral-7b"],
}
PROMPT, NEW_TOKENS = 64, 64  # tokens of text beside each picture, and to generate
# Eager PyTorch sums in another order and selects an expert otherwise where two are equal up to rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def build(size: str, device: torch.device, dtype: torch.dtype) -> CuMoForConditionalGeneration:
    """A model with random weights, made on the device."""
    config = CuMoConfig(**copy.deepcopy(SIZES[size]))
    with torch.device("meta"):
        model = CuMoForConditionalGeneration(config)
    model = model.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    for module in model.modules():  # buffers that are computed, not loaded
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config).to(device)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.inv_freq
    return model


def use_variant(model: CuMoForConditionalGeneration, variant: str) -> None:
    """Select our vision side or the published one."""
    if variant == "published_loop":
        from benchmarks.published_style import image_features

        model.vision_tower.config.encoder_config._attn_implementation = "eager"
        model.get_image_features = partial(image_features, model)  # type: ignore[method-assign]


class Subject:
    """A model with a batch for it."""

    def __init__(self, size: str, variant: str, images: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model = build(size, device, dtype)
        use_variant(self.model, variant)
        vision = self.model.config.vision_config
        side, generator = vision.encoder_config.image_size, torch.Generator().manual_seed(1)
        self.pixels = torch.randn(images, 3, side, side, generator=generator).to(device, dtype)
        text = torch.randint(3, 1000, (images, PROMPT), generator=generator)
        placeholders = torch.full((images, vision.num_patches), self.model.config.image_token_id)
        self.ids = torch.cat([placeholders, text], dim=1).to(device)
        self.labels = self.ids.masked_fill(self.ids == self.model.config.image_token_id, -100)

    def case(self, name: str) -> Callable[[], object]:
        """The function to be timed."""
        cases = {
            "vision": self._vision,
            "vision-train": self._vision_train,
            "train": self._train,
            "generate": self._generate,
        }
        return cases[name]

    def units(self, name: str) -> tuple[str, int]:
        """The unit of the rate, and how many of them one run makes."""
        if name == "generate":
            return "new tokens/s", NEW_TOKENS * len(self.pixels)
        return ("tokens/s", self.ids.numel()) if name == "train" else ("images/s", len(self.pixels))

    @torch.no_grad()
    def _vision(self) -> Tensor:
        embeddings = self.model.get_image_features(self.pixels).embeddings
        assert embeddings is not None
        return embeddings

    def _vision_train(self) -> None:
        features = self.model.get_image_features(self.pixels)
        assert features.embeddings is not None
        loss = features.embeddings.square().mean()
        for part in (features.vision_losses, features.connector_losses):
            assert part is not None
            loss = loss + 0.1 * part.balance + 0.01 * part.z
        self.model.zero_grad()
        loss.backward()

    def _train(self) -> None:
        self.model.zero_grad()
        loss = self.model(input_ids=self.ids, pixel_values=self.pixels, labels=self.labels, use_cache=False).loss
        assert loss is not None
        loss.backward()

    def _generate(self) -> Any:
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(self.ids)
        return self.model.generate(input_ids=self.ids, attention_mask=mask, pixel_values=self.pixels, **options)


def _host_peak(reset: bool = False) -> int | None:
    """Peak memory of this process since the last reset; None if the system does not report it."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(size: str, case: str, variant: str, images: int, device: str, dtype: str, budget_s: float) -> Row:
    """One row; meant for a process of its own."""
    place, kind = torch.device(device), DTYPES[dtype]
    subject = Subject(size, variant, images, place, kind)
    run = subject.case(case)
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    fingerprint = subject.case("vision")()
    assert isinstance(fingerprint, Tensor)
    _host_peak(reset=True)
    timing = time_call(run, place, budget_s)
    peak = peak_bytes(run, place)
    unit, count = subject.units(case)
    return {
        **environment(place),
        "size": size,
        "case": case,
        "images": images,
        "dtype": dtype,
        "variant": variant,
        "p20_ms": f"{timing.p20:.4g}",
        "p50_ms": f"{timing.p50:.4g}",
        "p80_ms": f"{timing.p80:.4g}",
        "runs": timing.runs,
        "rate": f"{1e3 * count / timing.p50:.4g}",
        "unit": unit,
        "weights_mb": f"{weights / 2**20:.0f}",
        "peak_mb": f"{((_host_peak() or 0) if peak is None else peak) / 2**20:.0f}",
        "peak_of": "process" if peak is None else "beyond weights",
        "_features": fingerprint.double().cpu().flatten()[:: max(1, fingerprint.numel() // 10000)].tolist(),
    }


def disagreement(rows: Sequence[Row]) -> float:
    """Largest relative error of the pictures' embeddings against those of the first row."""
    features = [torch.tensor(row["_features"], dtype=torch.float64) for row in rows]
    return max(((other - features[0]).norm() / features[0].norm()).item() for other in features)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model; default: %(default)s")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, default=1, help="pictures, each with a prompt; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of measuring for each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows; default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if the variants disagree."""
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    writer = Writer(options.out / f"end-to-end-{slug(device_name(torch.device(device)))}.csv")
    begin, wrong = time.monotonic(), False
    for case in options.cases:
        rows = []
        for variant in options.variants:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                work = (options.size, case, variant, options.images, device, dtype, options.budget)
                rows.append(pool.submit(measure, *work).result())
        error = disagreement(rows)
        shown = [{name: str(value) for name, value in row.items() if not name.startswith("_")} for row in rows]
        if error > TOLERANCE[DTYPES[dtype]]:
            print(f"{case}: the variants disagree by {error:.1e}: no times", flush=True)
            wrong = True
            continue
        for row in shown:
            writer.write(dict(row))
        columns = ("case", "variant", "p50_ms", "rate", "unit", "weights_mb", "peak_mb", "peak_of")
        print(table([{name: row[name] for name in columns} for row in shown], ("p50_ms", "rate")), flush=True)
    print(f"{len(writer.rows)} rows in {time.monotonic() - begin:.0f} s: {writer.path}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
