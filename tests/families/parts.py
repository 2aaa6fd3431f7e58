"""Backbones and parts of configs that several types of transformers share."""

from .shrink import tiny


class Later(dict):
    """Settings that are made when needed, so that importing this file imports no library."""

    def __init__(self, make):
        super().__init__()
        self.make = make


# -- backbones


def resnet():
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage4"],
    )  # fmt: skip


def stages(first):
    return [f"stage{stage}" for stage in range(first, 5)]


def rt_resnet():
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=stages(2),
    )  # fmt: skip


def hgnet(first=2):
    from transformers import HGNetV2Config

    return HGNetV2Config(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1], out_features=stages(first),
    )  # fmt: skip


def lw_vit():
    from transformers import LwDetrViTConfig

    return LwDetrViTConfig(
        image_size=32, pretrain_image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_windows=4, window_block_indices=[0], out_indices=[1, 2],
    )  # fmt: skip


def swin_backbone():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=32, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        patch_size=2, out_features=stages(1),
    )  # fmt: skip


def transformer(name, **more):
    """A vision transformer whose four layers feed the neck of another model."""
    import transformers

    sizes = {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 48, "reshape_hidden_states": False,
        "out_indices": [1, 2, 3, 4],
    }  # fmt: skip
    if "out_features" in more:
        del sizes["out_indices"]
    return getattr(transformers, name)(**{**sizes, **more})


def small(name):
    """A part whose config is not made by the config of the whole."""
    import transformers

    return tiny(getattr(transformers, name))


def superpoint():
    from transformers import SuperPointConfig

    return SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, descriptor_decoder_dim=32,
        max_keypoints=8, keypoint_threshold=0.0, border_removal_distance=1,
    )  # fmt: skip


def edgetam_vision():
    from transformers import EdgeTamVisionConfig, TimmWrapperConfig

    arguments = {
        "in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3],
        "embed_dim": [8, 16, 32, 64], "depth": [1, 1, 1, 1],
    }  # fmt: skip
    return EdgeTamVisionConfig(
        backbone_config=TimmWrapperConfig(architecture="repvit_m1", model_args=arguments),
        backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip


def tiny_timm(architecture, **args):
    """One of timm's models for tests."""
    from transformers import TimmWrapperConfig

    return TimmWrapperConfig(architecture=architecture, hidden_size=64, model_args=args or None)


def fastvit():
    from transformers import TimmWrapperConfig

    args = {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 32, 64), "inference_mode": True}
    return TimmWrapperConfig(architecture="fastvit_mci3", hidden_size=128, model_args=args)


def gemma3n_eyes():
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

    return Gemma3nVisionConfig(
        architecture="test_efficientnet", hidden_size=256, vocab_size=16, vocab_offset=60
    )


EYES = {"vision_config": Later(lambda: tiny_timm("test_vit"))}
DETR = Later(lambda: {"backbone_config": resnet(), "backbone": None, "use_timm_backbone": False})
#: Detectors that take the best positions of the encoder as queries.
RT_DETR = {
    "backbone_config": Later(rt_resnet), "encoder_in_channels": [16, 32, 32], "num_queries": 4,
    "decoder_in_channels": [32, 32, 32], "encoder_hidden_dim": 32, "d_model": 32,
}  # fmt: skip
HGNET = {**RT_DETR, "backbone_config": Later(hgnet), "encoder_in_channels": [8, 16, 16]}
DEPTH = {
    "backbone_config": Later(lambda: transformer("Dinov2Config")), "patch_size": 8,
    "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8,
    "head_hidden_size": 8,
}  # fmt: skip

# -- parts that several types share


def mrope(width=8, **more):
    half = width // 2
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2, 1, 1], **more}


QWEN = {"rope_parameters": mrope()}
#: Half of each head is rotated.
GLM = {"head_dim": 16, "rope_parameters": mrope(8, partial_rotary_factor=0.5)}
HEAD = {"head_dim": 8}
#: Settings that the parts of T5Gemma 2 get from the whole.
NO_DROPOUT = {"dropout_rate": 0.0, "query_pre_attn_scalar": 8}
SLIDING = {
    "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
#: Attention to tokens that an index selects.
INDEXED = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4, "layer_types": ["linear_attention", "indexed_attention"],
}  # fmt: skip
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16}

#: Recordings are cut into chunks, which also see the chunk after them.
STREAM = {"chunk_length": 16, "chunk_left_context": 2, "chunk_right_context": 2}
#: Of 5 ms, at the rate that it is.
FRAMES = {"sample_rate": 16000}
MUSE_AUDIO = {
    "num_hidden_layers": 2, "patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [2, 2],
}  # fmt: skip
#: Its class reads this setting, for which it has no default; configs of checkpoints have it.
PIX2STRUCT = {"initializer_range": 0.02}
TOKENIZER = {"downsampling_ratios": [2, 2], "depths": [2, 2, 2], "num_filters": 8}

SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 4, "window_size": 4}
WINDOWS = {"window_size": 32, "num_heads": 4, "out_hidden_size": 32}
LW_DETR = {
    "image_size": 32, "pretrain_image_size": 32, "num_windows": 4, "patch_size": 8,
    "out_indices": [2],
}  # fmt: skip
FORMULA = {"post_conv_in_channels": 32, "global_attn_indexes": [1]}
#: Windows of patches are merged after the first layer.
MERGED = {"insert_layer_id": 0}
#: There is one more class than pixels in a cell.
SUPERPOINT = {"keypoint_decoder_dim": 65}

SAM = {
    "vision_config": {
        "patch_size": 8, "image_size": 32, "output_channels": 32, "num_pos_feats": 16
    },
    "prompt_encoder_config": {"image_size": 32, "patch_size": 8, "image_embedding_size": 4},
}  # fmt: skip
HIERA = {
    "image_size": [64, 64], "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 4], "blocks_per_stage": [2, 2, 3, 2],
    "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [5],
}  # fmt: skip
HIERA_NECK = {
    "backbone_config": HIERA, "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
}  # fmt: skip
SAM2 = {"prompt_encoder_config": {"image_size": 64, "patch_size": 16}}

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
ERNIE = {"rope_parameters": mrope(mrope_section=[1, 1, 2]), "moe_intermediate_size": [16, 16]}
GEMMA3N = {"num_kv_shared_layers": 0, "intermediate_size": 48}
#: transformers builds no model if no layer has its own keys.
GEMMA4 = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
GROUPVIT = {
    "depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [8, 4, 0],
    "num_output_groups": [8, 4, 4],
}  # fmt: skip
COMPASS = {"full_attention": mrope()}

QWEN_AUDIO = {"n_window_infer": 100, "downsample_hidden_size": 16}
#: For Qwen's speech decoder: one layer that looks back and one that looks ahead.
DIT = {
    "num_hidden_layers": 2, "look_ahead_layers": [1], "look_backward_layers": [0], "mel_dim": 16,
    "enc_emb_dim": 16, "enc_dim": 16, "enc_channels": [16, 16, 16, 16, 48], "emb_dim": 16,
    "enc_kernel_sizes": [5, 3, 3, 3, 1], "enc_dilations": [1, 2, 3, 4, 1],
    "enc_attention_channels": 8, "enc_se_channels": 8, "hidden_size": 32, "head_dim": 8,
    "num_embeds": 99,
}  # fmt: skip
