"""Makes tiny configs of transformers from the default ones, by the names of their settings."""

import re
import zlib

#: (pattern of a setting's name, its size); the first match counts.
SIZES = [
    (r"(num_)?(key_value|kv)_heads|num_kv_heads|n_kv_heads|num_query_groups|kv_heads", 2),
    (r".*(linear_num|mamba).*key_heads", 2),
    (r".*lru_width", 32),
    (r".*(head_dim|d_kv|kv_channels|attention_head_size|head_size|qk_nope.*|v_head_dim)", 8),
    (r".*rope_head_dim", 4),
    (r".*(q_lora_rank|kv_lora_rank|lora_rank|low_rank.*)", 16),
    (r".*(num|n)_?.*heads?|.*attention_heads|.*_heads", 4),
    (r"num_(nextn|mtp).*layers", 0),
    (r".*moe_layer_start_index|first_k_dense_replace|num_dense_layers|.*dense_layers", 1),
    (r".*(n|num|encoder|decoder|hidden)_?(hidden_|encoder_|decoder_)?(layers?|blocks)", 2),
    (r"depth|layers|.*_depth|num_layers.*|.*num_.*_layers", 2),
    (r".*experts_per_tok.*|.*num_selected_experts|moe_topk|top_k_experts|moe_k|moe_top_k", 2),
    (r".*topk_group|.*n_group|num_expert_group.*", 1),
    (r".*(num|n)_(local_|routed_|moe_)?experts", 4),
    (r".*vocab_size|.*num_embeddings|.*vocab_size_.*", 99),
    (r".*(max_.*position.*|n_positions|max_seq.*len.*|n_ctx|max_target_positions)", 128),
    (r".*max_2d_position.*", 128),
    (r".*image_size|.*img_size|input_size|.*crop_size", 32),
    (r".*patch_size", 8),
    (r".*window_size", 4),
    (r".*sliding_window|.*attention_chunk_size|.*block_size|.*chunk_size|.*chunk_length", 8),
    (r".*(intermediate|ffn|mlp|d_ff|ff|n_inner|inner|feedforward|feed_forward).*(size|dim)?", 48),
    (r".*(num_mel_bins|feature_size|input_feat_per_channel)", 16),
    (r".*num_queries|.*num_latents|num_object_queries", 6),
    (r".*conv_pos_embeddings|num_conv_pos_embeddings", 8),
    (r".*groups", 2),
    (r".*num_frames|.*tubelet_size", 2),
    (r".*embedding_size", 32),
    (r".*(hidden|embed|model|channels|proj|width|dim|size|rank|d_|state).*", 32),
]

#: Settings that are not sizes, although their names suggest it.
KEPT = re.compile(
    r".*(num_channels|in_channels|in_chans|input_channels|chunk_size_feed_forward|type_vocab_size|"
    r"kernel|stride|dilation|_ratio|temporal_patch|spatial_merge|num_labels|sampling_rate|"
    r"conv_size|conv_depth|token|_idx|expand|dt_rank|scale_factor|downsample|_index).*|"
    r"type_sequence_.*|.*position_embedding_type|hidden_act"
)


def size(name, value):
    """The value of a size in a tiny model; never larger than before."""
    if KEPT.fullmatch(name):
        return value
    for pattern, small in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, small)
    return min(value, 64)


def token(name, taken):
    """A small id for a special token, different for each name."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in usual:
        return usual[name]
    choice = 50 + zlib.crc32(name.encode()) % 40
    while choice in taken:
        choice = 50 + (choice - 49) % 40
    taken.add(choice)
    return choice


def tiny(cls, overrides=None, taken=None):
    """A small config of a class: settings by their names, then ``overrides``.

    ``overrides`` may be nested: settings of a part by the name of the part.
    """
    overrides, taken = dict(overrides or {}), set() if taken is None else taken
    default = cls()
    # If the layers of a model differ, reading some settings as attributes raises an error.
    values = {**vars(default), **getattr(default, "to_dict", dict)()}
    # If a model has stages, a list has one entry for each.
    depth = values.get("num_hidden_layers") or values.get("num_layers")
    depth = None if "depths" in values else depth
    settings = {}
    for name in cls.__dataclass_fields__:
        if name in getattr(cls, "sub_configs", {}):
            part = getattr(default, name, None)
            if hasattr(overrides.get(name), "to_dict"):
                continue
            if hasattr(part, "to_dict"):
                own = tiny(type(part), overrides.pop(name, None), taken)
                settings[name] = own if name in ("backbone_config",) else own.to_dict()
        elif name not in ("transformers_version", "model_type", "dtype"):
            small = _smaller(name, values.get(name), depth, taken)
            if small is not None:
                settings[name] = small
    heads = [n for n in settings if re.fullmatch(r"(num_attention_heads|n_head|num_heads)", n)]
    for name in ("num_key_value_heads", "num_kv_heads"):
        if heads and name in settings and values[name] == values[heads[0]]:
            settings[name] = settings[heads[0]]
    rope = values.get("rope_parameters") or {}
    if "mrope_section" in rope and "rope_parameters" not in overrides:
        settings["rope_parameters"] = _sections(rope, {**settings, **overrides})
    if "use_cache" in values:
        settings["use_cache"] = False
    settings.update(overrides)
    return cls(**settings)


def _smaller(name, value, depth, taken):
    """The value of one setting; None to leave it to the class."""
    if re.fullmatch(r".*token_(id|index)s?", name):
        if isinstance(value, list):
            return [2]
        return token(name, taken) if type(value) is int else None
    if re.fullmatch(r".*drop.*", name) and isinstance(value, float):
        return 0.0
    if type(value) is int:
        return size(name, value)
    if not isinstance(value, list | tuple) or not value:
        return None
    if depth and depth > 2 and len(value) == depth:
        # Two layers: the first one and, if there is one, a layer of another kind.
        other = next((v for v in value if v != value[0]), value[0])
        return [value[0], other]
    return sizes(name, value) if all(type(v) is int for v in value) else None


def _sections(rope, settings):
    """Sections of multimodal rotary embeddings; they fill half of the rotated dimensions."""
    width = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    half = int(width * rope.get("partial_rotary_factor", 1)) // 2
    return {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def sizes(name, values):
    """A list of sizes, of the same length."""
    if KEPT.fullmatch(name) or re.match(
        r"_?out_|.*(index|indices|indexes|stages|axes|section)", name
    ):
        return list(values)
    if re.match(r".*(depths|num_blocks|layers|num_block|blocks)$", name):
        return [min(v, 2) for v in values]
    largest = max(values)
    if re.match(r".*heads", name):
        return [min(v, 2) for v in values]
    if re.match(r".*(window|pool|patch|size_list|resolution)", name):
        return list(values)
    if largest <= 16:
        return list(values)
    return [max(8, 32 * v // largest) for v in values] if min(values) > 0 else list(values)
