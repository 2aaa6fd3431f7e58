"""What the names of settings do not tell about types of transformers."""


def _mrope(width=8, **more):
    half = width // 2
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2, 1, 1], **more}


QWEN = {"rope_parameters": _mrope()}
#: Half of each head is rotated.
GLM = {"head_dim": 16, "rope_parameters": _mrope(8, partial_rotary_factor=0.5)}
WINDOWS = {"window_size": 32, "num_heads": 4, "out_hidden_size": 32}
HEAD = {"head_dim": 8}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16}


def _resnet():
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage4"],
    )  # fmt: skip


class Later(dict):
    """Settings made when they are asked for, so that reading this file imports nothing."""

    def __init__(self, make):
        super().__init__()
        self.make = make


DETR = Later(lambda: {"backbone_config": _resnet(), "backbone": None, "use_timm_backbone": False})
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4, "window_size": 4}

SAM = {
    "vision_config": {
        "patch_size": 8, "image_size": 32, "output_channels": 32, "num_pos_feats": 16
    },
    "prompt_encoder_config": {"image_size": 32, "patch_size": 8, "image_embedding_size": 4},
}  # fmt: skip

ATOMS = {"num_spatial_rope_pairs_per_axis": 1, "num_uid_rope_pairs": 1}
#: Rotates at least 32 numbers of each head.
CLVP = {"hidden_size": 64, "num_attention_heads": 2}
CLAP = {
    "spec_size": 32, "num_mel_bins": 16, "depths": [2, 2], "num_attention_heads": [2, 4],
    "patch_embeds_hidden_size": 16, "hidden_size": 32,
}  # fmt: skip
DEEPSEEK_OCR = {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
DEEPSEEK_EYES = {"sam_config": {"downsample_channels": [16, 32]}}
DIFFUSION_GEMMA = {
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "global_head_dim": 8,
}  # fmt: skip
ERNIE = {"rope_parameters": _mrope(mrope_section=[1, 1, 2]), "moe_intermediate_size": [16, 16]}
GEMMA3N = {"num_kv_shared_layers": 0, "intermediate_size": 48}
#: Of a config without layers that have keys of their own, transformers builds no model.
GEMMA4 = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
GROUPVIT = {
    "depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [8, 4, 0],
    "num_output_groups": [8, 4, 4],
}  # fmt: skip
COMPASS = {"full_attention": _mrope()}

QWEN_AUDIO = {"n_window_infer": 100, "downsample_hidden_size": 16}

#: Settings of a type; those of a part by its name.
SETTINGS = {
    "align": {
        "projection_dim": 32, "vision_config": {
            "width_coefficient": 1.0, "depth_coefficient": 1.0,
            "in_channels": [32, 8, 8, 8, 16, 16, 16], "out_channels": [8, 8, 8, 16, 16, 16, 32],
        },
    },
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16},
    "autoformer": {**SERIES, "label_length": 2, "moving_average": 3},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "hidden_size": 32},
    "blip-2": {"image_token_index": 60},
    "bridgetower": {
        "vision_config": {"num_hidden_layers": 2, "hidden_size": 64},
        "text_config": {"num_hidden_layers": 2}, "num_hidden_layers": 2,
    },
    "bridgetower_vision_model": {"hidden_size": 64},
    "bros": {"hidden_size": 64},
    "chameleon": {
        "vq_config": {"num_embeddings": 10, "channel_multiplier": [1, 1, 1, 1, 1]},
        "vocabulary_map": {"<image>": 60, **{f"IMGIMG{c}Z": ord(c) for c in "ABCDEFGHIJ"}},
    },
    "clap": {"audio_config": CLAP},
    "clap_audio_model": CLAP,
    "clvp": {"text_config": CLVP, "speech_config": CLVP},
    "clvp_encoder": CLVP,
    "codegen": {"rotary_dim": 4},
    "cohere_compass": {
        "text_config": {"rope_parameters": COMPASS},
        "vision_config": {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    },
    "cohere_compass_text": {"rope_parameters": COMPASS},
    "colqwen2": {"vlm_config": {"text_config": QWEN}},
    "conditional_detr": DETR,
    "dab-detr": DETR,
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_ocr2": {"text_config": DEEPSEEK_OCR, "vision_config": DEEPSEEK_EYES},
    "deepseek_ocr2_text": DEEPSEEK_OCR,
    "deepseek_ocr2_vision": DEEPSEEK_EYES,
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "deformable_detr": DETR,
    "depth_pro": {"patch_size": 16, "intermediate_hook_ids": [1, 0]},
    "detr": DETR,
    "diffusion_gemma": {"text_config": DIFFUSION_GEMMA},
    "diffusion_gemma_text": DIFFUSION_GEMMA,
    "donut-swin": SWIN,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 16},
    "efficientloftr": {
        "out_features": [8, 8, 16, 32], "stage_num_blocks": [1, 1, 1, 1], "num_attention_heads": 8
    },
    "emu3": {
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1]},
        "vocabulary_map": {
            "<image>": 60, "<|extra_200|>": 61,
            **{f"<|visual token {i:06}|>": 64 + i for i in range(32)},
        },
    },
    "ernie4_5_vl_moe": {"text_config": ERNIE},
    "ernie4_5_vl_moe_text": ERNIE,
    "esm": {"vocab_size": 40, "pad_token_id": 0, "mask_token_id": 4},
    "esmfold2": {
        "atom_feature_dim": None, "single_inputs_size": 99, "atom_encoder": ATOMS, "num_loops": 1,
        "structure_head": {"diffusion_module": {"atom_encoder": ATOMS}},
    },
    "exaone4_5_vision": WINDOWS,
    "fast_vlm": {"vision_config": Later(lambda: _fastvit())},
    "fastspeech2_conformer_with_hifigan": {
        "vocoder_config": {"model_in_dim": 16, "upsample_initial_channel": 32}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n": {
        "text_config": GEMMA3N, "vision_config": Later(lambda: _gemma3n_eyes()),
        "audio_config": {"vocab_size": 23, "vocab_offset": 76},
        "image_token_id": 60, "audio_token_id": 80,
        "vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 3,
    },
    "gemma3n_text": GEMMA3N,
    "gemma4_unified_assistant": {"text_config": GEMMA4, "backbone_hidden_size": 24},
    "glm46v": {"text_config": GLM},
    "glm4v": {"text_config": GLM},
    "glm4v_moe": {"text_config": GLM},
    "glm4v_moe_text": GLM,
    "glm4v_text": GLM,
    "glm_image": {"text_config": GLM},
    "glm_image_text": GLM,
    "glm_ocr": {"text_config": GLM},
    "glm_ocr_text": GLM,
    "glmga": {"text_config": GLM},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "granite4_vision": {
        "downsample_rate": "2/4", "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [1, 2, 3, 4], "image_grid_pinpoints": [[32, 32]],
        "text_config": {"num_hidden_layers": 5}, "vision_config": {"hidden_size": 64},
    },
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2},
    "grounding-dino": {"num_queries": 3},
    "groupvit": {"vision_config": GROUPVIT},
    "groupvit_vision_model": GROUPVIT,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "hunyuan_vl": {"text_config": {**HEAD, **QWEN}},
    "hunyuan_vl_text": {**HEAD, **QWEN},
    "informer": {**SERIES, "sampling_factor": 2},
    "inkling_mm_model": {
        "vision_config": {"num_hidden_layers": 2},
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
    },
    "inkling_vision": {"num_hidden_layers": 6, "patch_size": 4},
    "instructblip": {"image_token_index": 60},
    "instructblipvideo": {"video_token_index": 60, "num_query_tokens": 4},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 2, "state_size": 16},
    "mask2former": {
        "backbone_config": Later(lambda: _swin_backbone()), "feature_size": 32,
        "mask_feature_size": 32, "hidden_dim": 32, "num_feature_levels": 3,
    },
    "maskformer": {
        "backbone_config": Later(lambda: _swin_backbone()), "fpn_feature_size": 32,
        "mask_feature_size": 32,
    },
    "maskformer-swin": SWIN,
    "ministral": HEAD,
    "mm-grounding-dino": {"num_queries": 3},
    "mobilevit": {"hidden_sizes": [16, 16, 32], "num_attention_heads": 2},
    "nemotron": {**HEAD, "num_key_value_heads": 2},
    "oneformer": {"backbone_config": Later(lambda: _swin_backbone())},
    "paddleocr_vl_text": QWEN,
    "qwen2_5_omni_audio_encoder": {"n_window": 8},
    "qwen2_5_omni_talker": QWEN,
    "qwen2_5_omni_text": QWEN,
    "qwen2_5_omni_thinker": {"text_config": QWEN},
    "qwen2_5_omni_vision_encoder": WINDOWS,
    "qwen2_5_vl": {"text_config": QWEN, "vision_config": WINDOWS},
    "qwen2_5_vl_text": QWEN,
    "qwen2_5_vl_vision": WINDOWS,
    "qwen2_vl": {"text_config": QWEN},
    "qwen2_vl_text": QWEN,
    "qwen3_asr_encoder": QWEN_AUDIO,
    "qwen3_omni_moe_audio_encoder": QWEN_AUDIO,
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4,
        "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "hidden_size": 32,
    },
    "sam": SAM,
    "sam_hq": SAM,
    "swin": SWIN,
    "swin2sr": {"num_heads": [2, 4], "depths": [2, 2], "embed_dim": 16, "window_size": 4},
    "swinv2": SWIN,
    "table-transformer": DETR,
    "time_series_transformer": SERIES,
    "vits": {"vocab_size": 50, "upsample_initial_channel": 32, "spectrogram_bins": 16},
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "yolos": {"image_size": [32, 32], "num_detection_tokens": 6},
}  # fmt: skip


def _swin_backbone():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        patch_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def _fastvit():
    from transformers import TimmWrapperConfig

    args = {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 32, 64), "inference_mode": True}
    return TimmWrapperConfig(architecture="fastvit_mci3", hidden_size=128, model_args=args)


def _gemma3n_eyes():
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

    return Gemma3nVisionConfig(
        architecture="test_efficientnet", hidden_size=256, vocab_size=16, vocab_offset=60
    )


#: Models that sort, pick or round on their way: in half precision they jump.
JUMPING = {"groupvit", "groupvit_vision_model", "jamba", "rf_detr", "sam3_lite_text", "vits"}
#: What `adapt` says of models without a layer that it can adapt.
REFUSED = {
    "falcon": "FalconLinear is not a plain nn.Linear",
    "ibert": "the only slice of its shape",
    "sam3_lite_text_text_model": "Conv2d is not a linear layer",
    "squeezebert": "Conv1d is not a linear layer",
}
#: Checked with torch.compile.
COMPILED = {"bert", "gpt2", "llama", "swin", "t5", "whisper"}
#: Checked on every run of the tests: each way of using layers once.
OFTEN = {
    "albert", "bart", "bert", "big_bird", "bloom", "blip", "clip", "convbert", "convnext",
    "ctrl", "cvt", "data2vec-vision", "deberta", "deberta-v2", "deepseek_v3", "detr",
    "distilbert", "dpt", "electra", "encoder-decoder", "falcon", "falcon_mamba", "fnet", "fsmt",
    "funnel", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "hiera", "higgs_audio_v2", "hubert", "ibert", "idefics2_perceiver", "informer", "jamba",
    "layoutlmv3", "led", "llama", "llama4_text", "longformer", "longt5", "lxmert", "m2m_100",
    "mamba", "mamba2", "mask2former", "mixtral", "mllama_text_model", "mobilebert", "mobilevit",
    "mpnet", "mpt", "mt5", "musicgen_decoder", "nystromformer", "oneformer", "openai-gpt",
    "opt", "patchtst", "perceiver", "phi3", "qwen2_5_vl", "qwen2_vl_vision", "qwen3_moe",
    "qwen3_next", "recurrent_gemma", "reformer", "roformer", "rwkv", "sam", "segformer",
    "sew-d", "siglip", "speech-encoder-decoder", "speech_to_text", "speecht5", "squeezebert",
    "swiftformer", "swin", "swinv2", "switch_transformers", "t5", "timesformer", "vilt",
    "vision-text-dual-encoder", "vit", "vitdet", "wav2vec2", "wavlm", "whisper",
    "xclip_vision_model", "xglm", "xlm", "xlnet", "xlstm", "yoso", "zamba2",
}  # fmt: skip
