"""Our attention by name, for every transformers model that takes one: importing this module registers it.

    import axo_flash.hf
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="axo_fa")
    model.set_attn_implementation("axo_fa")  # or later
    print(axo_flash.hf.calls)  # Counter({'triton': 960}): the calls that each backend really computed in this process

It serves causal attention: padding (left and right), packing (position_ids that restart, or cu_seq_lens_q), sliding
windows, GQA, KV caches, attention dropout, softcap (Gemma 2) and sinks (gpt-oss), with each call on the best backend that
can serve it. What it cannot compute (4-D and bidirectional masks) raises a ValueError. For Llama and Mistral
`axo_flash.patch_model` does the same, can be told the backend, and counts the calls of one model.
"""

from axo_flash.attention import NAME, register
from axo_flash.ops import calls

__all__ = ["NAME", "calls"]

register()
