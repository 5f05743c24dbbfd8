# SPDX-License-Identifier: Apache-2.0
"""A language model whose tokenizer has no BOS and an EOS of its own, from its parts to an answer that ends."""

import pytest

pytest.importorskip("accelerate", reason="training needs the extra train")

from safetensors.torch import load_file

from cumo import CuMoForConditionalGeneration
from cumo.inference import CuMoPipeline, GenerationOptions
from cumo.models.prompts import Template, chat_template
from cumo.train import Recipe, run_stage
from tests.data.samples import Files, llava
from tests.numerics import relative_error
from tests.train.tiny import read_log, recipe_of, train_in_processes, write_data, write_parts, write_recipe

OWN = {  # of a recipe, in YAML
    "opening": "Question: ",
    "opening_without_system": "Question: ",
    "before_user": "Question: ",
    "after_user": "\nAnswer:",
    "before_answer": " ",
    "after_answer": "</s>\n",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "template"),
    [("qwen2", "llava_v1"), ("qwen3", "mistral_instruct_system"), ("qwen2", "chatml"), ("qwen3", OWN)],
    ids=["llava_v1", "mistral", "chatml", "own"],
)
def test_it_learns_to_answer(tmp_path, kind, template):
    parts = write_parts(tmp_path / "parts", kind, bos=None, eos="<|im_end|>", control=["<|im_start|>"])
    files = Files(tmp_path)
    picture = files.picture("a.png", seed=1)
    data = files.json([llava("q", "yes", images=[picture])] * 4).path
    recipe = recipe_of(tmp_path / "run", parts, data, data={"template": template}, optimizer={"lr": 1e-2})
    stage = run_stage(Recipe.from_dict({**recipe, "steps": 80}))
    pipeline = CuMoPipeline.from_pretrained(stage.folder, device="cpu")
    assert pipeline.processor.chat_template == chat_template(Template(**template) if template is OWN else template)
    question = [{"type": "image", "image": str(tmp_path / picture)}, {"type": "text", "text": "q"}]
    (completion,) = pipeline.generate(
        [[{"role": "user", "content": question}]], GenerationOptions(max_new_tokens=20, temperature=0.0)
    )
    assert (completion.text.strip(), completion.finish_reason) == ("yes", "stop")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_embeddings_that_are_tied_in_two_processes(tmp_path, kind):
    parts = write_parts(tmp_path / "parts", "qwen2", bos=None, eos="<|im_end|>", text={"tie_word_embeddings": True})
    data = write_data(tmp_path / "data")
    logs, weights = [], []
    for name, options in (("alone", {}), ("divided", {"distributed": kind, "batch": {"per_device_batch_size": 2}})):
        recipe = recipe_of(tmp_path / name, parts, data, **options)
        if options:
            train_in_processes(write_recipe(tmp_path / "recipe.yaml", recipe))
        else:
            run_stage(Recipe.from_dict(recipe))
        logs.append([(line["loss"], line["grad_norm"]) for line in read_log(tmp_path / name)])
        weights.append(load_file(tmp_path / name / "final" / "model.safetensors"))
    assert logs[0] == [pytest.approx(pair, rel=1e-5) for pair in logs[1]]
    assert weights[0].keys() == weights[1].keys()
    assert "language_model.lm_head.weight" not in weights[0]
    for name, tensor in weights[0].items():  # steps of text alone among them
        if not name.endswith("k_proj.bias"):  # whose gradient is zero but for rounding
            assert relative_error(weights[1][name], tensor) <= 1e-4, name
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "divided" / "final")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
