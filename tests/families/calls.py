"""Inputs that only one type of transformers takes, or a few do."""

import torch


def _series(s):
    c = s.config
    past = c.context_length + max(c.lags_sequence)

    def value(length):
        return s.randn(2, length)

    features = c.num_time_features
    return {
        "past_values": value(past), "past_time_features": s.randn(2, past, features),
        "past_observed_mask": torch.ones(2, past), "future_values": value(c.prediction_length),
        "future_time_features": s.randn(2, c.prediction_length, features),
    }  # fmt: skip


def _decisions(s):
    c = s.config
    return {
        "states": s.randn(2, 5, c.state_dim), "actions": s.randn(2, 5, c.act_dim),
        "rewards": s.randn(2, 5, 1), "returns_to_go": s.randn(2, 5, 1),
        "timesteps": torch.arange(5).expand(2, 5), "attention_mask": torch.ones(2, 5),
    }  # fmt: skip


def _flat_patches(s):
    """SigLIP 2: two images of 4 x 4 patches."""
    patch = s.setting("patch_size", default=8)
    return {
        "pixel_values": s.randn(2, 16, 3 * patch * patch),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _both(s):
    return {"input_ids": s.ids(), "pixel_values": s.image()}


def _points(s):
    return {"pixel_values": s.randn(2, 3, 32, 32), "input_points": s.randn(2, 1, 2, 2)}


def _pages(s):
    return {"input_ids": s.ids(), "bbox": s.boxes()}


def _question(s):
    return {**_both(s), "attention_mask": torch.ones(2, s.text, dtype=torch.long)}


#: Inputs that only this type takes.
CALLS = {
    "audio-spectrogram-transformer": lambda s: {"input_values": s.randn(2, 32, 16)},
    "audioflamingo3_encoder": lambda s: {
        "input_features": s.features(),
        "input_features_mask": torch.ones(2, s.features().shape[2], dtype=torch.long),
    },
    "autoformer": _series,
    "blip_2_qformer": lambda s: {
        "query_embeds": s.randn(2, 6, 32),
        "encoder_hidden_states": s.randn(2, 5, s.config.encoder_hidden_size),
    },
    "decision_transformer": _decisions,
    "grounding-dino": _question,
    "idefics2_perceiver": lambda s: {
        "context": s.randn(2, 5, 32), "attention_mask": torch.ones(2, 5, dtype=torch.long)
    },
    "informer": _series,
    "lxmert": lambda s: {
        "input_ids": s.ids(), "visual_feats": s.randn(2, 5, s.config.visual_feat_dim),
        "visual_pos": s.randn(2, 5, 4),
    },
    "mm-grounding-dino": _question,
    "oneformer": lambda s: {"pixel_values": s.image(), "task_inputs": s.ids(s.config.task_seq_len)},
    "patchtsmixer": lambda s: {
        "past_values": s.randn(2, s.config.context_length, s.config.num_input_channels)
    },
    "patchtst": lambda s: {
        "past_values": s.randn(2, s.config.context_length, s.config.num_input_channels)
    },
    "perceiver": lambda s: {"inputs": s.randn(2, 9, s.config.d_model)},
    "pix2struct_vision_model": lambda s: {
        "flattened_patches": torch.cat(
            (torch.ones(2, 8, 2), s.randn(2, 8, s.config.patch_embed_hidden_size)), dim=-1
        )
    },
    "sam": _points,
    "sam_hq": _points,
    "siglip2": lambda s: {"input_ids": s.ids(), **_flat_patches(s)},
    "siglip2_vision_model": _flat_patches,
    "speecht5": lambda s: {
        "input_values": s.randn(2, 9, 32), "decoder_input_values": s.randn(2, 7, 32)
    },
    "time_series_transformer": _series,
    "timesfm": lambda s: {
        "past_values": s.randn(2, 64), "past_values_padding": torch.zeros(2, 64),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda s: {
        "past_values": s.randn(2, 64), "past_values_padding": torch.zeros(2, 64)
    },
    "udop": lambda s: {"input_ids": s.ids(), "bbox": s.boxes() / 10, "decoder_input_ids": s.ids(7)},
    "vits": lambda s: {"input_ids": s.ids()},
    "wav2vec2-bert": lambda s: {"input_features": s.randn(2, 12, 16)},
    "xclip": lambda s: {"input_ids": s.ids(), "pixel_values": s.randn(2, 2, 3, 32, 32)},
    "yolos": lambda s: {"pixel_values": s.randn(2, 3, 32, 32)},
}  # fmt: skip
