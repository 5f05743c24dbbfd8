# SPDX-License-Identifier: Apache-2.0
"""The small language model of the demo and its tokenizer, trained on text alone: captions, and questions on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from cumo.demo import scenes
from cumo.demo.settings import Settings
from cumo.demo.training import device, optimise
from cumo.models.prompts import CHAT_TEMPLATE, TEMPLATES, render_text
from cumo.models.tokenizer import IMAGE_TOKEN

TEMPLATE = "mistral_instruct_system"
SYSTEM = ""  # the published system prompt is half as long as all else of a small prompt
# CLIP would take a text whose </s> had the id 2 for one of its first tokenizer, and look for its end elsewhere.
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>")
TEXTS_FOR_TOKENIZER = 2000


def chat_template() -> str:
    """The published template, without a system prompt where a conversation has none."""
    return CHAT_TEMPLATE.replace(TEMPLATES[TEMPLATE].system, SYSTEM)


def random_text(rng: Generator, most: int) -> str:
    """A scene told in words, and then either told again in order or asked about."""
    scene = scenes.random_scene(rng, most)
    facts = scenes.facts(scene)
    told = ", ".join(facts[index] for index in rng.permutation(len(facts)))
    if rng.random() < 0.5:
        return f"<s>{told}\n{scenes.caption(scene)}\n"
    questions = scenes.questions(scene)
    asked = questions[rng.integers(len(questions))]
    turns = [{"from": "human", "value": f"{told}\n{asked.text}"}, {"from": "gpt", "value": asked.answer}]
    return render_text(TEMPLATE, turns, system=SYSTEM)


def train_tokenizer(texts: list[str], size: int) -> Any:
    """A byte-level BPE tokenizer with the control tokens that the prompts need; `<image>` comes last.

    Args:
        texts: to train on.
        size: of the vocabulary at most, `<image>` not counted.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    unk, pad, bos, eos = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True)]})
    return tokenizer


def padded(rows: list[list[int]], padding: int) -> Tensor:
    """Rows of ids as one tensor [B, L], padded on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


def pretrain(folder: Path, settings: Settings) -> float:
    """Train tokenizer and language model, and write both as transformers does; the final loss."""
    rng = np.random.default_rng([settings.seed, 1])
    torch.manual_seed(settings.seed)
    texts = [random_text(rng, settings.most_digits) for _ in range(TEXTS_FOR_TOKENIZER)]
    # every word of the other templates too, so that none of them falls into bytes
    tokenizer = train_tokenizer([*texts, *[TEMPLATES[TEMPLATE].system] * 20], settings.vocabulary)
    # prompts are short: slower rotations than these would not tell their positions apart
    rotations: Any = {"rope_theta": settings.rope_theta}
    config = MistralConfig(
        vocab_size=len(tokenizer) - 1,
        hidden_size=settings.text_width,
        intermediate_size=2 * settings.text_width,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=settings.text_width // 4,
        max_position_embeddings=1024,
        sliding_window=None,
        # wide for a small model; with the usual 0.02 its first hundreds of steps go into leaving zero
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **rotations,
    )
    model: Any = MistralForCausalLM(config)
    model.to(device())

    def loss_of() -> Tensor:
        rows = [
            tokenizer(random_text(rng, settings.most_digits), add_special_tokens=False)["input_ids"]
            for _ in range(settings.text_batch)
        ]
        ids = padded(rows, -100).to(model.device)
        logits = model(input_ids=ids.clamp(min=0)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss = optimise(model, loss_of, settings.text_steps, settings.text_lr, "language model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss
