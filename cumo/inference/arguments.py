# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments of the commands that answer with a model."""

from __future__ import annotations

import argparse

from cumo.inference.loading import DTYPES
from cumo.inference.pipeline import CuMoPipeline
from cumo.models.quantization import QUANTIZATIONS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model to load, and how it runs."""
    parser.add_argument("model", help="folder of a checkpoint, of either layout, or a name on the hub")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto is that of the checkpoint")
    parser.add_argument("--device", help="such as cpu or cuda:0; the first GPU, if there is one, by default")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the language model; needs bitsandbytes")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step: slow to start, then faster")
    parser.add_argument("--static-cache", action="store_true", help="reserve the memory of keys and values at once")
    parser.add_argument("--model-base", help="what a published adapter or first stage builds on")


def load_pipeline(arguments: argparse.Namespace) -> CuMoPipeline:
    """Load the pipeline that the parsed arguments describe.

    Raises:
        ValueError: an argument or the checkpoint is invalid.
    """
    options = {} if arguments.model_base is None else {"model_base": arguments.model_base}
    try:
        return CuMoPipeline.from_pretrained(
            arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            quantization=arguments.quantization,
            compile=arguments.compile,
            static_cache=arguments.static_cache,
            **options,
        )
    except ImportError as error:
        raise ValueError(str(error)) from error
