"""Tiny models in the place of those that peft's tests take from the hub, made from configs.

They are laid out as the cache of the hub is, so that whatever asks for one by its name finds it
there. Numbers are drawn: no test of peft's that is for all methods depends on them.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_VOCABULARY = 300
_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

#: Part of a name in lower case -> the part of the names of its classes, its config, the kind of
#: model that is saved. The first that fits is taken.
_KINDS = {
    "llama": ("Llama", _LLAMA, "ForCausalLM"),
    "mistral": ("Mistral", _LLAMA, "ForCausalLM"),
    "qwen2": ("Qwen2", _LLAMA, "ForCausalLM"),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}, "ForCausalLM"),
    "gemma3": ("Gemma3Text", {**_LLAMA, "head_dim": 8}, "Gemma3ForCausalLM"),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 4}, "ForCausalLM"),
    "gpt2": ("GPT2", _GPT2, "LMHeadModel"),
    "gptneox": ("GPTNeoX", _BERT, "ForCausalLM"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}, "ForCausalLM"),
    "opt-": ("OPT", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32}, "ForCausalLM"),
    "optfor": ("OPT", {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32}, "ForCausalLM"),
    "t5": ("T5", {**_T5, "decoder_start_token_id": 3}, "ForConditionalGeneration"),
    "bart": (
        "Bart",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
            "max_position_embeddings": 128, "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        "ForConditionalGeneration",
    ),
    "roberta": ("Roberta", _BERT, "Model"),
    "debertav2": ("DebertaV2", _BERT, "Model"),
    "deberta": ("Deberta", _BERT, "Model"),
    "bert": ("Bert", _BERT, "Model"),
}  # fmt: skip


def make_models(names, hub):
    """Puts a model under each name into a cache of the hub, but for names that tell no kind.

    Args:
        names: "owner/model".
        hub: the folder of the cache.
    """
    for name in names:
        short = name.rpartition("/")[2].lower()
        kind = next((value for key, value in _KINDS.items() if key in short), None)
        if (kind is None and "lora" not in short) or "gptq" in short:
            continue
        folder = Path(hub) / f"models--{name.replace('/', '--')}"
        if folder.is_dir():
            continue
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        for revision in ("main", "test"):
            (folder / "refs" / revision).write_text("0" * 40)
        if "lora" in short:  # an adapter: of these, configs alone are asked for
            (snapshot / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
            continue
        transformers.utils.logging.disable_progress_bar()
        _make_model(name, *kind).save_pretrained(snapshot)
        _tokenizer().save_pretrained(snapshot)


def _make_model(name, family, settings, head):
    if "ForSequenceClassification" in name:
        head = "ForSequenceClassification"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=_VOCABULARY, **_IDS, **settings)
    kind = head if hasattr(transformers, head) else f"{family}{head}"
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.05:
                parameter.mul_(5)  # so narrow a model hardly sees its layers else
    return model


def _tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"bos_token": "<s>", "unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = {token: index for index, token in enumerate([*special.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
