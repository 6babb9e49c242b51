"""What the plugin makes of a YAML, between the file and Axolotl's own validation."""

import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

pytest.importorskip("axolotl.integrations", reason="needs Axolotl, in an environment of its own: see .ci/run")

import yaml
from axolotl.cli.config import plugin_set_cfg, prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl_bench import PLUGIN
from hf_models import tiny
from packaging.requirements import Requirement

import axo_flash
from axo_flash.config import load_config
from axo_flash.errors import UserError
from axo_flash.integrations.axolotl import REFUSED, REPLACED, AxoFlashPlugin

SMALL = {
    "base_model": "model",
    "datasets": [{"path": "rows.jsonl", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "sequence_len": 64,
    "plugins": [PLUGIN],
}


@pytest.fixture(autouse=True)
def no_plugins_of_another_test():
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    yield
    manager.plugins.clear()
    manager.plugins.update(before)


def registered(**keys) -> DictDefault:
    """The raw YAML as Axolotl hands it to validation."""
    cfg = DictDefault(SMALL | keys)
    prepare_plugins(cfg)
    return cfg


def loaded(**keys) -> DictDefault:
    """The configuration as Axolotl works with it, on a machine with a GPU."""
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
    cfg = validate_config(registered(**keys), capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})
    plugin_set_cfg(cfg)
    PluginManager.get_instance().load_datasets(cfg)
    return cfg


@pytest.mark.parametrize(
    ("asked", "replaces", "flattens", "casts"),
    [
        ({}, "sdpa", False, False),
        ({"flash_attention": True}, "flash_attention_2", True, True),
        ({"flash_attention": False}, "sdpa", False, False),
        ({"sdp_attention": True, "flash_attention": None}, "sdpa", False, False),
        ({"attn_implementation": "axo_fa"}, "sdpa", False, False),
        ({"xformers_attention": True, "flash_attention": True}, "xformers", True, True),
        ({"attn_implementation": "eager"}, "eager", False, False),
        ({"attn_implementation": "sdpa", "sdpa_varlen": True}, "sdpa", False, False),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2", True, True),
        ({"attn_implementation": "flash_attention_4"}, "flash_attention_4", True, True),
        ({"attn_implementation": "flex_attention"}, "flex_attention", True, True),
        ({"attn_implementation": "kernels-community/flash-attn2@v2"}, "kernels-community/flash-attn2@v2", True, True),
    ],
    ids=str,
)
def test_every_choice_of_attention_makes_way(asked, replaces, flattens, casts):
    """And Axolotl goes on to pack and to cast as for the choice that was made, without looking for its package."""
    cfg = loaded(sample_packing=True, **asked)
    assert (cfg.attn_implementation, cfg.axo_flash_replaces) == ("eager", replaces)
    assert (cfg.attn_supports_packing, cfg.attn_needs_dtype_cast) == (flattens, casts)
    assert cfg.attn_decontaminates_packing and not cfg.attn_uses_flash_lib and cfg.sdpa_varlen is None
    assert cfg.attention_backend == "auto"


def test_what_follows_from_a_name_is_axolotls():
    """The same choice without the plugin has the flags that the plugin restores."""
    for name in set(REPLACED) - {"axo_fa", "flash_attention_2", "flash_attention_3", "flash_attention_torch"}:
        plain = DictDefault(SMALL | {"attn_implementation": name, "plugins": None, "sample_packing": True})
        plain = validate_config(plain)
        ours = loaded(sample_packing=True, attn_implementation=name)
        for flag in ("attn_supports_packing", "attn_needs_dtype_cast", "attn_decontaminates_packing"):
            assert ours[flag] == plain[flag], (name, flag)


def test_registering_twice_keeps_what_was_asked():
    """As a Ray worker does, from the configuration that the driver validated."""
    cfg = loaded(attn_implementation="flash_attention_2")
    prepare_plugins(cfg)
    assert (cfg.attn_implementation, cfg.axo_flash_replaces) == ("eager", "flash_attention_2")


@pytest.mark.parametrize(
    "keys",
    [
        {"context_parallel_size": 2},
        {"sequence_parallel_degree": 4},
        {"scaling_softmax": True, "attn_implementation": "flex_attention"},
        {"flash_attn_cross_entropy": True},
        {"flash_attn_fuse_mlp": True, "flash_attention": True},
        {"batch_flattening": True},
        {"torch_compile": "auto", "sample_packing": True},
        {"attn_implementation": "sage"},
        {"sage_attention": True},
        {"attn_implementation": "fp8"},
        {"attn_implementation": "someone/their-kernel"},
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused_by_name(keys):
    with pytest.raises(UserError) as caught:
        registered(**keys)
    key = next(iter(keys)).replace("sage_attention", "attn_implementation: sage")
    assert key in str(caught.value) and "remove these keys, or the plugin" in str(caught.value)


def test_all_refusals_come_at_once_and_off_is_off():
    with pytest.raises(UserError) as caught:
        registered(**dict.fromkeys(REFUSED, 2) | {"batch_flattening": True, "attn_implementation": "sage"})
    assert all(f"{key}: " in str(caught.value) for key in (*REFUSED, "attn_implementation"))
    registered(context_parallel_size=1, batch_flattening="auto", flash_attn_fuse_mlp=False, scaling_softmax=None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attn_implementation": "flash"}, "Use the canonical name 'flash_attention_2'"),
        ({"attn_implementation": "sdpa", "flash_attention": True}, "cannot be combined with legacy"),
        ({"attention_backend": "cuda"}, "'auto', 'hopper', 'triton' or 'reference'"),
    ],
    ids=str,
)
def test_mistakes_are_left_to_axolotl(keys, message):
    with pytest.raises(ValueError, match=message):
        loaded(**keys)


def test_a_rejected_yaml_gets_its_words_back():
    keys = {"flash_attention": True, "sdpa_varlen": None}
    cfg = registered(**keys)
    assert cfg["attn_implementation"] == "eager" and "flash_attention" not in cfg
    PluginManager.get_instance().on_config_validation_error(cfg)
    assert cfg == DictDefault(SMALL | keys)


def test_a_yaml_without_the_plugin_is_left_alone():
    """Axolotl calls the plugins of a process's earlier runs too."""
    registered()
    other = DictDefault(SMALL | {"flash_attention": True, "plugins": ["axolotl.integrations.liger.LigerPlugin"]})
    prepare_plugins(other)
    assert other["flash_attention"] is True and "attn_implementation" not in other


BROKEN = f"""
import sys
sys.modules[{{missing!r}}] = None  # as if it were not installed
from axolotl.integrations.base import PluginManager
PluginManager.get_instance().register({PLUGIN!r})
print("Axolotl goes on")
"""


@pytest.mark.parametrize("missing", ["axo_flash.patch", "axo_flash.kernels.backends"])
def test_a_plugin_that_cannot_be_imported_ends_the_run(missing):
    """Axolotl prints a plugin's ImportError and trains without the plugin."""
    run = subprocess.run([sys.executable, "-c", BROKEN.format(missing=missing)], capture_output=True, text=True)
    assert run.returncode == 1 and "Axolotl goes on" not in run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: axo_flash's plugin for Axolotl cannot be loaded: ")
    assert missing in last and "pip install 'axo-flash[flash-attn]'" in last


def test_importing_it_without_axolotl_says_what_to_install():
    code = "import sys; sys.modules['axolotl'] = None; import axo_flash.integrations.axolotl"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "pip install axolotl" in run.stderr.strip().splitlines()[-1]


def test_axolotls_versions_stay():
    """Installing axo-flash beside Axolotl, as .ci/run does, changes none of the versions that Axolotl pins."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert len(pinned) >= 10
    assert {name: version(name).partition("+")[0] for name in pinned} == pinned
    wanted = [Requirement(text) for text in requires("axo-flash") or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": "flash-attn"})]
    assert not [str(one) for one in wanted if not one.specifier.contains(version(one.name), prereleases=True)]


def test_steps_without_our_attention_end_the_run():
    """Where the layers are ours still, but something else stands before them."""
    plugin = AxoFlashPlugin()
    model = tiny("llama")
    plugin.report = axo_flash.patch_model(model)
    plugin.count_step(model, calls=2)
    with pytest.raises(RuntimeError, match="step 2 called our attention 1 times, expected at least once for each of 2"):
        plugin.count_step(model, calls=1)


def test_the_readmes_yaml_is_axolotls_and_ours(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    block = next(text for text in readme.split("```") if text.startswith("yaml") and PLUGIN in text)
    path = tmp_path / "axolotl.yml"
    path.write_text(block.removeprefix("yaml"), encoding="utf-8")
    cfg = DictDefault(yaml.safe_load(path.read_text(encoding="utf-8")))
    prepare_plugins(cfg)
    assert validate_config(cfg).axo_flash_replaces == "flash_attention_2"
    assert load_config(path).attn_implementation == "axo_fa"
