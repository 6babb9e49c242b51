"""Plugins for Axolotl that take our attention out again, as a plugin of somebody else's might."""

import axolotl.integrations.base
import transformers

import axo_flash


class AfterLoading(axolotl.integrations.base.BasePlugin):
    """Once the model is loaded."""

    def post_model_build(self, cfg, model):
        axo_flash.unpatch_model(model)


class _AtStart(transformers.TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        axo_flash.unpatch_model(model)


class WhileTraining(axolotl.integrations.base.BasePlugin):
    """When training begins."""

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [_AtStart()]
