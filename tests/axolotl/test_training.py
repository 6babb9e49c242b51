"""Real Axolotl trains tiny models by our attention: the loss and grad_norm that it prints are those of eager attention."""

import pytest

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

pytestmark = pytest.mark.timeout(480)  # the first test waits for all runs
EAGER = {"plugins": None, "attn_implementation": "eager"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
# name -> (family, keys of both runs, keys of eager's, keys of ours)
PAIRS = {
    "full": ("llama", {}, {}, {"flash_attention": True}),
    # with the flash attentions Axolotl makes one row of a packed batch: eager's is told to
    "flattened": (
        "mistral",
        LORA | {"micro_batch_size": 2, "val_set_size": 30, "eval_steps": 2, "eval_sample_packing": False},
        {"multipack_real_batches": False},
        {"attn_implementation": "flash_attention_2"},
    ),
    "real-batches": ("llama", {"micro_batch_size": 2}, {}, {"attn_implementation": "sdpa"}),
    "checkpointing": ("mistral", {"gradient_checkpointing": True}, {}, {"xformers_attention": True}),
    "padded": ("llama", {"sample_packing": False, "pad_to_sequence_len": False, "micro_batch_size": 4}, {}, {}),
    "qlora": ("llama", QLORA, {}, {"flash_attention": True}),
}
FIGURES = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def outputs(bench):
    paths = []
    for name, (family, keys, eager, ours) in PAIRS.items():
        paths.append(bench.write(f"{name}-eager", family, **keys | EAGER | eager))
        paths.append(bench.write(f"{name}-ours", family, **keys | ours))
    saving = {"max_steps": 4, "save_strategy": None, "save_steps": 2}
    paths.append(bench.write("saving", **saving, flash_attention=True))
    resuming = {"resume_from_checkpoint": str(bench.directory / "out" / "saving" / "checkpoint-2")}
    paths.append(bench.write("resumed-eager", **saving | resuming | EAGER))
    paths.append(bench.write("resumed-ours", **saving | resuming, flash_attention=True))
    return bench.run_all(*paths)


@pytest.mark.parametrize("name", PAIRS)
def test_figures_are_eagers(outputs, name):
    eager, ours = outputs[f"{name}-eager"], outputs[f"{name}-ours"]
    assert (eager.ended, ours.ended) == ("well", "well")
    assert not eager.says(), "the plugin of an earlier run in this process has no say in one without it"
    assert len(ours.logged(*FIGURES)) == 3
    assert ours.logged(*FIGURES) == eager.logged(*FIGURES)
    assert ours.logged("eval_loss") == eager.logged("eval_loss")
    assert bool(ours.logged("eval_loss")) == ("val_set_size" in PAIRS[name][1])


@pytest.mark.parametrize("name", PAIRS)
def test_the_log_says_what_ran(outputs, name):
    family, keys = PAIRS[name][:2]
    taken, patched, summary = outputs[f"{name}-ours"].says()
    assert taken.startswith("takes the place of the YAML's attention")
    assert patched.startswith(f"2 {family} layers on the backend 'reference' (not hopper: ")
    calls = 2 * 3 * 2  # layers, steps, gradient accumulation
    if keys.get("gradient_checkpointing"):
        calls *= 2
    if "val_set_size" not in keys:  # how often it evaluates is Axolotl's affair
        assert summary == f"2 {family} layers patched, backend reference, {calls} calls in 3 steps, fallbacks: none"
    else:
        assert summary.startswith(f"2 {family} layers patched, backend reference, ")
        assert int(summary.split()[6]) > calls and summary.endswith(" calls in 3 steps, fallbacks: none")


def test_resuming(outputs):
    """From our checkpoint: the steps that are left are those of eager attention that resumes from it."""
    assert len(outputs["saving"].logged(*FIGURES)) == 4
    eager, ours = outputs["resumed-eager"], outputs["resumed-ours"]
    assert (eager.ended, ours.ended) == ("well", "well")
    assert len(ours.logged(*FIGURES)) == 2
    assert ours.logged(*FIGURES) == eager.logged(*FIGURES)
    assert ours.says()[-1].endswith(" 8 calls in 2 steps, fallbacks: none")
