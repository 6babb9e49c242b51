"""`axolotl train` as its users call it: it works, or it ends with an error; and what the plugin refuses when loading."""

import pytest

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

from axolotl_bench import PLUGIN


def test_train(bench):
    code, output = bench.train(bench.write("train", flash_attention=True))
    assert code == 0, output.text[-3000:]
    assert output.says()[-1] == "2 llama layers patched, backend reference, 12 calls in 3 steps, fallbacks: none"
    lines = output.text.splitlines()
    assert any(output.says()[-1] in line for line in lines[-8:]), "the end of the log states it"
    assert len(output.logged("loss", "grad_norm")) == 3


def test_a_plugin_without_effect_fails_the_run(bench):
    code, output = bench.train(bench.write("train-without", plugins=[PLUGIN, "unpatching.WhileTraining"]))
    assert code != 0
    assert "RuntimeError: axo_flash: the plugin did not take effect: 0 of 2 layers of LlamaForCausalLM" in output.text
    assert not output.logged("loss"), "it ends at the first step"


def test_models_that_cannot_be_served(bench):
    outputs = bench.run_all(
        bench.write("gemma", "gemma", base_model=str(bench.model("gemma", head_dim=16, hidden_activation="gelu"))),
        bench.write("undone", plugins=[PLUGIN, "unpatching.AfterLoading"]),
        bench.write("by-name", attention_backend="hopper"),
        bench.write("asks-for-sage", attn_implementation="sage"),
    )
    gemma = "UserError: axo_flash has no attention for the model family 'gemma' of "
    assert outputs["gemma"].ended.startswith(gemma) and "it serves llama and mistral" in outputs["gemma"].ended
    assert outputs["undone"].ended.startswith("RuntimeError: axo_flash: the plugin did not take effect: 0 of 2 layers")
    assert outputs["by-name"].ended.startswith("ValueError: no attention backend can serve this call (not hopper: ")
    assert outputs["asks-for-sage"].ended.startswith("UserError: axo_flash: the YAML asks for what the plugin cannot")


def test_the_triton_kernel(bench):
    """In Triton's interpreter, with weights in float16: eager attention to within its rounding."""
    half = {"float16": True, "sequence_len": 96, "gradient_accumulation_steps": 1}
    half |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    outputs = bench.run_all(
        bench.write("half-eager", "mistral", **half, plugins=None, attn_implementation="eager"),
        bench.write("half-triton", "mistral", **half, attn_implementation="eager", attention_backend="triton"),
        TRITON_INTERPRET="1",
    )
    eager, ours = outputs["half-eager"], outputs["half-triton"]
    assert (eager.ended, ours.ended) == ("well", "well")
    summary = "2 mistral layers patched, backend triton, 6 calls in 3 steps, fallbacks: none"
    assert ours.says()[-1] == summary
    for got, expected in zip(ours.logged("loss", "grad_norm"), eager.logged("loss", "grad_norm"), strict=True):
        assert [float(x) for x in got] == pytest.approx([float(x) for x in expected], rel=0.02)
