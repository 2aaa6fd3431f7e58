"""Small models of the libraries that peft's users come from: from configs, nothing downloaded."""

import torch
import transformers
from monai.networks.nets import UNETR

#: transformers 4, whose files have what its models have, by nearly the same names.
IS_FOUR = transformers.__version__.startswith("4.")

#: What peft says about transformers and about models without a name; none of it concerns us.
PEFT_SAYS = (
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Could not find a config file in  - will assume:UserWarning",
)


def gpt2():
    """Conv1D layers, weights stored (in, out); lm_head tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    """Four query heads, two key and value heads: two shapes of attention weights."""
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def unetr():
    return UNETR(
        in_channels=1,
        out_channels=2,
        img_size=(32, 16, 16),
        feature_size=4,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    )


#: Model, its input (made after seeding), what its output is called, and a peft task type.
HF_MODELS = {
    "gpt2": (gpt2, lambda: {"input_ids": torch.randint(50, (2, 9))}, "CAUSAL_LM"),
    "llama": (llama, lambda: {"input_ids": torch.randint(50, (2, 9))}, "CAUSAL_LM"),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}, None),
    "unetr": (unetr, lambda: {"x_in": torch.randn(1, 1, 32, 16, 16)}, None),
}


def output(model, inputs):
    """The logits, whatever a model wraps them in."""
    y = model(**inputs)
    return getattr(y, "logits", y)
