# SPDX-License-Identifier: Apache-2.0
"""A language model whose tokenizer has no BOS and an EOS of its own, from its parts to an answer that ends."""

import pytest

pytest.importorskip("accelerate", reason="training needs the extra train")

from cumo.inference import CuMoPipeline, GenerationOptions
from cumo.models.prompts import chat_template
from cumo.train import Recipe, run_stage
from tests.data.samples import Files, llava
from tests.train.tiny import recipe_of, write_parts


@pytest.mark.slow
@pytest.mark.parametrize("template", ["llava_v1", "mistral_instruct_system"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_it_learns_to_answer(tmp_path, kind, template):
    parts = write_parts(tmp_path / "parts", kind, bos=None, eos="<|im_end|>")
    files = Files(tmp_path)
    picture = files.picture("a.png", seed=1)
    data = files.json([llava("q", "yes", images=[picture])] * 4).path
    recipe = recipe_of(tmp_path / "run", parts, data, data={"template": template}, optimizer={"lr": 1e-2})
    stage = run_stage(Recipe.from_dict({**recipe, "steps": 80}))
    pipeline = CuMoPipeline.from_pretrained(stage.folder, device="cpu")
    assert pipeline.processor.chat_template == chat_template(template)
    question = [{"type": "image", "image": str(tmp_path / picture)}, {"type": "text", "text": "q"}]
    (completion,) = pipeline.generate(
        [[{"role": "user", "content": question}]], GenerationOptions(max_new_tokens=20, temperature=0.0)
    )
    assert (completion.text.strip(), completion.finish_reason) == ("yes", "stop")
