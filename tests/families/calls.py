"""Inputs that only one or a few types of transformers take."""

import torch


def _ones(*shape):
    return torch.ones(shape, dtype=torch.long)


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
        "pixel_attention_mask": _ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _both(s):
    return {"input_ids": s.ids(), "pixel_values": s.image()}


def _points(s):
    return {"pixel_values": s.randn(2, 3, 32, 32), "input_points": s.randn(2, 1, 2, 2)}


def _question(s):
    return {**_both(s), "attention_mask": _ones(2, s.text)}


def _marked(s, token, number):
    """Text with placeholders for the embeddings of an image or a sound."""
    ids = s.ids(number + 4)
    ids[:, 2 : 2 + number] = token
    return ids


def _asked(s, frames=0):
    """BLIP-2 and its descendants: each image takes as many positions as there are queries."""
    c = s.config
    token = c.video_token_index if frames else c.image_token_index
    seen = _marked(s, token, c.num_query_tokens * max(frames, 1))
    image = s.image()
    if frames:
        image = s.randn(2, frames, *image.shape[1:])
    return {"pixel_values": image, "input_ids": seen}


def _instructed(s, frames=0):
    return {**_asked(s, frames), "qformer_input_ids": s.ids(5)}


def _sounds(s):
    """Two sounds, one after the other, without padding."""
    bins = s.config.num_mel_bins
    return {"input_features": s.randn(bins, 60), "feature_lens": torch.tensor([32, 28])}


def _masked(features, frames):
    """Spectrograms and a mask; the second spectrogram is shorter."""
    mask = _ones(2, frames)
    mask[1, frames - 7 :] = 0
    return {"input_features": features, "input_features_mask": mask}


def _mel_images(s):
    """CLAP: spectrograms of one channel, frames first."""
    return {"input_features": s.randn(2, 1, 32, 16)}


def _read(s, number, **more):
    """Text with an image in each row, which takes ``number`` positions."""
    ids = _marked(s, s.setting("image_token_id", "image_token_index"), number)
    return {"input_ids": ids, "pixel_values": s.image()} | more


def _read_patches(s, number):
    """The same with images as flat patches; token types tell image positions from text."""
    read = _read(s, number, image_grid_thw=s.grid())
    kinds = (read["input_ids"] == s.config.image_token_id).int()
    return {**read, "pixel_values": s.patches(), "mm_token_type_ids": kinds}


def _heard(s):
    """Text and two sounds; the second sound is shorter."""
    ids = s.ids(16)
    ids[0, 2:14] = ids[1, 2:7] = s.config.audio_token_id
    return {"input_ids": ids, **_masked(s.randn(2, 12, s.config.audio_config.input_size), 12)}


def _placed_patches(s, side=6):
    """Gemma 4: flat patches of two images, and the position of each patch."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack((columns.flatten(), rows.flatten()), dim=-1).expand(2, -1, -1)
    return {"pixel_values": s.randn(2, side * side, 3 * 8 * 8), "pixel_position_ids": places}


def _diffused(s):
    """Diffusion Gemma; the canvas is given, since it would be random otherwise."""
    image = _placed_patches(s)
    ids = _marked(s, s.config.image_token_id, 4)
    return {
        "input_ids": ids, "mm_token_type_ids": (ids == s.config.image_token_id).int(),
        "pixel_values": image["pixel_values"], "image_position_ids": image["pixel_position_ids"],
        "decoder_input_ids": s.ids(7), "self_conditioning_logits": s.randn(2, 7, 99),
    }  # fmt: skip


def _seen_and_heard(s):
    c = s.config
    ids = s.ids(14)
    ids[:, 1:5], ids[:, 6:9] = c.image_token_id, c.audio_token_id
    return {
        "input_ids": ids, "pixel_values": s.randn(2, 3, 64, 64),
        "input_features": s.randn(2, 32, c.audio_config.input_feat_size),
        "input_features_mask": torch.ones(2, 32, dtype=torch.bool),
    }  # fmt: skip


def _drafted(s):
    """Gemma 4's assistant: layers that share keys and values use those of another model."""

    def shared():
        return s.randn(2, 2, 9, 8), s.randn(2, 2, 9, 8)

    return {
        "inputs_embeds": s.randn(2, 9, 2 * s.config.backbone_hidden_size),
        "position_ids": torch.arange(9).expand(2, -1),
        "shared_kv_states": {"full_attention": shared(), "sliding_attention": shared()},
    }


def _inkled(s):
    """Inkling: patches of images, and sounds as tokens for every band."""
    c, bands = s.config, s.config.audio_config.n_mel_bins
    images, sounds = _marked(s, c.image_token_id, 3), _marked(s, c.audio_token_id, 4)
    return {
        "input_ids": torch.cat((images, sounds), dim=1), "pixel_values": s.randn(6, 2, 8, 8, 3),
        "audio_input_ids": torch.randint(0, 9, (2, 4, bands), generator=s.generator),
    }  # fmt: skip


def _folded(s, tokens=6, atoms=12):
    """ESMFold 2: a chain of residues with two atoms each, and an alignment of three sequences."""
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs

    place = torch.arange(tokens).expand(2, -1)
    owner = (torch.arange(atoms) // 2).expand(2, -1)
    same = torch.zeros(2, tokens, dtype=torch.long)
    names = torch.randint(0, 20, (2, atoms, s.config.max_chars), generator=s.generator)
    residues = torch.randint(0, 20, (2, 3, tokens), generator=s.generator)
    return {
        "token_index": place, "residue_index": place, "asym_id": same, "sym_id": same,
        "entity_id": same, "mol_type": same, "res_type": residues[:, 0],
        "token_bonds": torch.zeros(2, tokens, tokens, 1), "msa": residues,
        "attention_mask": torch.ones(2, tokens, dtype=torch.bool), "input_ids": s.ids(tokens),
        "atom_inputs": EsmFold2AtomInputs(
            ref_pos=s.randn(2, atoms, 3), ref_charge=torch.zeros(2, atoms),
            atom_attention_mask=torch.ones(2, atoms, dtype=torch.bool),
            ref_element=names[..., 0] + 1,
            ref_atom_name_chars=names, ref_space_uid=owner, atom_to_token=owner,
        ),
    }  # fmt: skip


def _larger_image(s):
    """An image of which the encoder's attention sees four positions; the usual one leaves one."""
    return {"pixel_values": s.randn(2, 3, 64, 64)}


def _numbered_patches(s):
    """Pix2Struct: two images of eight patches, each preceded by its row and column."""
    width = s.setting("patch_embed_hidden_size")
    return {"flattened_patches": torch.cat((torch.ones(2, 8, 2), s.randn(2, 8, width)), dim=-1)}


def _packed_patches(s):
    """MiniCPM-V: the patches of two images of 4 x 4 in one row."""
    patch = s.setting("patch_size", default=8)
    return {
        "pixel_values": s.randn(1, 3, patch, 32 * patch),
        "target_sizes": torch.tensor([[4, 4], [4, 4]]),
    }


def _pixel_patches_of_two(s):
    """Muse: flat patches of two frames."""
    return {"pixel_values": s.randn(32, 384), "grid_thw": s.grid()}


def _objects(s):
    """Three objects per image; with fewer, the few output numbers might agree by chance."""
    return {"pixel_values": s.randn(2, 3, 64, 64), "input_points": s.randn(2, 3, 2, 2)}


def _stacked_frames(s):
    """Spectrograms with their differences, two frames in one."""
    return {"input_features": s.randn(2, 24, 4 * s.setting("num_mel_bins"))}


def _detr_encoder(s):
    image, text = (2, 32, 4, 4), (2, 5, 32)
    return {
        "vision_features": [s.randn(*image)], "vision_pos_embeds": [s.randn(*image)],
        "text_features": s.randn(*text),
    }  # fmt: skip


def _detr_decoder(s):
    image, text = (2, 16, 32), (2, 5, 32)
    return {
        "vision_features": s.randn(*image), "vision_pos_encoding": s.randn(*image),
        "text_features": s.randn(*text), "spatial_shapes": torch.tensor([[4, 4]]),
    }  # fmt: skip


def _mask_decoder(s):
    return {
        "decoder_queries": s.randn(2, 6, 32), "encoder_hidden_states": s.randn(2, 16, 32),
        "backbone_features": [s.randn(2, 32, size, size) for size in (16, 8, 4)],
        "prompt_features": s.randn(2, 5, 32),
    }  # fmt: skip


#: Inputs that only this type takes.
CALLS = {
    "align": lambda s: {"input_ids": s.ids(), "pixel_values": s.randn(2, 3, 32, 32)},
    "audio-spectrogram-transformer": lambda s: {"input_values": s.randn(2, 32, 16)},
    "audioflamingo3_encoder": lambda s: {
        "input_features": s.features(),
        "input_features_mask": _ones(2, s.features().shape[2]),
    },
    "autoformer": _series,
    "blip-2": _asked,
    "blip_2_qformer": lambda s: {
        "query_embeds": s.randn(2, 6, 32),
        "encoder_hidden_states": s.randn(2, 5, s.config.encoder_hidden_size),
    },
    "blt_local_decoder": lambda s: {
        "inputs_embeds": s.hidden(), "patch_embeds": s.randn(2, 4, s.config.hidden_size_global)
    },
    "blt_local_encoder": lambda s: {
        "input_ids": s.ids(), "num_patches": 4, "patch_ids": torch.arange(s.text).expand(2, -1) // 3
    },
    "bridgetower_vision_model": lambda s: {"image": s.image()},
    "bros": lambda s: {"input_ids": s.ids(), "bbox": s.randn(2, s.text, 8)},
    "chameleon": lambda s: _read(s, 4),
    "clap": lambda s: {"input_ids": s.ids(), **_mel_images(s)},
    "clap_audio_model": _mel_images,
    "clvp": lambda s: {"input_ids": s.ids(), "input_features": s.randn(2, 16, 20)},
    "clvp_encoder": lambda s: {"input_ids": s.ids()},
    "cohere_compass": lambda s: _read_patches(s, 4),
    "d_fine": _larger_image,
    "decision_transformer": _decisions,
    "deepseek_ocr2": lambda s: _read(s, 145),
    "deepseek_ocr2_encoder": lambda s: {"inputs_embeds": s.hidden(), "num_patches": 4},
    "deimv2": _larger_image,
    "depth_pro": lambda s: {"pixel_values": s.randn(1, 3, 64, 64)},
    "dia_decoder": lambda s: {
        "input_ids": s.ids()[..., None].expand(2, s.text, s.config.num_channels),
        "encoder_hidden_states": s.randn(2, 5, s.config.cross_hidden_size),
    },
    "diffusion_gemma": _diffused,
    "dots3_note_audio_encoder": lambda s: {
        "input_features": s.features(), "chunk_sample_lengths": torch.tensor([32, 20])
    },
    "edgetam": _objects,
    "efficientloftr": lambda s: {"pixel_values": s.randn(2, 2, 3, 64, 64)},
    "emu3": lambda s: _read(s, 20, image_sizes=torch.tensor([[32, 32], [32, 32]])),
    "ernie4_5_vl_moe": lambda s: _read_patches(s, 4),
    "ernie4_5_vl_moe_text": lambda s: {
        "input_ids": s.ids(),
        "moe_mm_token_type_ids": (torch.arange(s.text) > 4).int().expand(2, -1),
    },
    "esmfold2": _folded,
    "fast_vlm": lambda s: {**_read(s, 1), "pixel_values": s.randn(2, 3, 64, 64)},
    "florence_vision": lambda s: {"hidden_states": s.randn(2, 3, 64, 64)},
    "fun_asr_nano": _heard,
    "fun_asr_nano_encoder": lambda s: _masked(s.randn(2, 12, s.config.input_size), 12),
    "gemma3n": _seen_and_heard,
    "gemma3n_audio": lambda s: {
        "audio_mel": s.randn(2, 32, s.config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 32, dtype=torch.bool),
    },
    "gemma4_unified_assistant": _drafted,
    "gemma4_vision": _placed_patches,
    "granite4_vision": lambda s: {
        **_read(s, 10), "pixel_values": s.randn(2, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32], [32, 32]]),
    },
    "granite_speech5_ctc": _stacked_frames,
    "granite_speech5_encoder": _stacked_frames,
    "grounding-dino": _question,
    "groupvit": _both,
    "hunyuan_vl": lambda s: _read_patches(s, 8),
    "idefics": lambda s: {
        "input_ids": s.ids(), "pixel_values": s.image()[:, None],
        "image_attention_mask": _ones(2, s.text, 1),
    },
    "idefics2_perceiver": lambda s: {
        "context": s.randn(2, 5, 32), "attention_mask": _ones(2, 5)
    },
    "informer": _series,
    "inkling2_vision": lambda s: {
        "pixel_values": s.randn(8, 16, 16, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]]),
    },
    "inkling_mm_model": _inkled,
    "inkling_vision": lambda s: {"pixel_values": s.randn(6, 2, 4, 4, 3)},
    "instructblip": _instructed,
    "instructblipvideo": lambda s: _instructed(s, 4),
    "jev": lambda s: {
        "input_ids": s.ids()[:1], "marks": torch.tensor([[5, 9]]),
        "num_options": torch.tensor([[2, 3]]), "question_type_ids": torch.tensor([[0, 1]]),
    },
    "kimi_k25_vision": lambda s: {
        "pixel_values": s.randn(32, 3, 8, 8), "grid_thw": s.grid()
    },
    "kosmos-2": lambda s: {
        **_both(s), "image_embeds_position_mask": (torch.arange(s.text) < 4).expand(2, -1)
    },
    "kosmos_2_5_vision_model": _numbered_patches,
    "lightglue": lambda s: {"pixel_values": s.randn(2, 2, 3, 32, 32)},
    "lxmert": lambda s: {
        "input_ids": s.ids(), "visual_feats": s.randn(2, 5, s.config.visual_feat_dim),
        "visual_pos": s.randn(2, 5, 4),
    },
    "mimi_decoder": lambda s: {"latents": s.randn(2, s.config.hidden_size, 5)},
    "minicpm_ocr_vision": _packed_patches,
    "minicpmv4_6_vision": _packed_patches,
    "minicpmv4_7_vision": _packed_patches,
    "mllama_vision_model": lambda s: {
        "pixel_values": s.randn(2, 1, 4, 3, 32, 32), "aspect_ratio_ids": torch.tensor([[4], [6]]),
        "aspect_ratio_mask": _ones(2, 1, 4),
    },
    "mm-grounding-dino": _question,
    "molmo2": lambda s: {
        "input_ids": _marked(s, s.config.image_patch_id, 4), "pixel_values": s.randn(2, 16, 192),
        "image_token_pooling": torch.arange(32).view(8, 4),
        "image_grids": torch.tensor([[1, 2, 1, 2], [1, 2, 1, 2]]),
    },
    "molmo2_adapter": lambda s: {
        "image_features": s.randn(2, 16, 64), "pooled_patches_idx": torch.arange(32).view(8, 4),
    },
    "molmo2_vision": lambda s: {"pixel_values": s.randn(2, 16, 192)},
    "moonshine_streaming": lambda s: {
        "input_values": s.wave(), "decoder_input_ids": s.ids(7)
    },
    "muse_glimmer_assistant": lambda s: {
        "noise_embeds": s.hidden(), "context_hidden_states": s.randn(2, 5, 64),
        "attention_mask": _ones(2, 14),
    },
    "muse_glimmer_vision": _pixel_patches_of_two,
    "muse_spark": lambda s: {
        "input_ids": torch.cat(
            (_marked(s, s.config.image_token_id, 4), _marked(s, s.config.audio_token_id, 4)), dim=1
        ),
        "pixel_values": s.randn(32, 384), "image_grid_thw": s.grid(),
        "input_values": s.randn(2, 64),
    },
    "muse_spark_vision": _pixel_patches_of_two,
    "musicgen": lambda s: {"input_ids": s.ids(), "decoder_input_ids": torch.cat([s.ids(7)] * 4)},
    "musicgen_melody": lambda s: {
        "input_ids": s.ids(), "decoder_input_ids": torch.cat([s.ids(7)] * 4),
        "input_features": s.randn(2, 5, 12),
    },
    "nemo_speechlm": lambda s: {
        "input_ids": _marked(s, s.config.audio_token_id, 4),
        "input_features": s.randn(2, 32, 16),
        "input_features_mask": _ones(2, 32),
    },
    "neomme": lambda s: {
        "input_ids": _marked(s, s.config.image_token_id, 4), "pixel_values": s.randn(8, 192)
    },
    "neucodec": lambda s: {
        "input_values": s.randn(2, 1, 3200), "input_features": s.randn(2, 10, 32),
    },
    "oneformer": lambda s: {"pixel_values": s.image(), "task_inputs": s.ids(s.config.task_seq_len)},
    "paddleocr_vl": lambda s: {**_read_patches(s, 4), "pixel_values": s.randn(32, 3, 8, 8)},
    "paddleocr_vl_vision": lambda s: {
        "pixel_values": s.randn(1, 32, 3, 8, 8), "grid_thw": s.grid()
    },
    "patchtsmixer": lambda s: {
        "past_values": s.randn(2, s.config.context_length, s.config.num_input_channels)
    },
    "patchtst": lambda s: {
        "past_values": s.randn(2, s.config.context_length, s.config.num_input_channels)
    },
    "pe_audio": lambda s: {"input_ids": s.ids(), "input_values": s.wave()[:, None]},
    "pe_audio_video": lambda s: {
        "input_ids": s.ids(), "input_values": s.wave()[:, None], "pixel_values_videos": s.video()
    },
    "pe_audio_video_encoder": lambda s: {
        "input_values": s.wave()[:, None], "pixel_values_videos": s.video()
    },
    "pe_video": lambda s: {"input_ids": s.ids(), "pixel_values_videos": s.video()},
    "perceiver": lambda s: {"inputs": s.randn(2, 9, s.config.d_model)},
    "phi4_multimodal_audio": lambda s: {
        "hidden_states": s.randn(2, 32, s.config.input_size),
        "mask": torch.ones(2, 32, dtype=torch.bool),
    },
    "pi0": lambda s: {
        "input_ids": torch.cat(
            (torch.full((2, 16), s.config.vlm_config.image_token_id), s.ids()), dim=1
        ),
        "pixel_values": s.randn(2, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "attention_mask": _ones(2, 16 + s.text),
        "action_embeds": s.randn(2, 5, s.config.dit_config.hidden_size),
    },
    "pix2struct": lambda s: {**_numbered_patches(s), "decoder_input_ids": s.ids(7)},
    "pix2struct_vision_model": _numbered_patches,
    "pocket_tts_audio_tokenizer_decoder": lambda s: {"latents": s.randn(2, 32, 5)},
    "pp_doclayout_v2": _larger_image,
    "pp_doclayout_v3": _larger_image,
    "pp_doclayout_v4": _larger_image,
    "qwen2_5_omni_audio_encoder": _sounds,
    "qwen2_5_omni_dit": lambda s: {
        "hidden_states": s.randn(2, 8, 16), "condition_vector": s.randn(2, 12, 16),
        "speaker_embedding": s.randn(2, 8, 16), "quantized_code": s.ids(4),
        "time_step": torch.tensor([0.25, 0.75]),
    },
    "qwen3_asr_encoder": lambda s: _masked(s.randn(2, s.config.num_mel_bins, 100), 100),
    "qwen3_omni_moe_audio_encoder": _sounds,
    "qwen4_exp": lambda s: _read_patches(s, 4),
    "rag": lambda s: {
        "context_input_ids": torch.cat((s.ids(), s.ids())),
        "context_attention_mask": _ones(4, s.text),
        "doc_scores": s.randn(2, 2), "decoder_input_ids": s.ids(7), "n_docs": 2,
    },
    "rt_detr": _larger_image,
    "rt_detr_v2": _larger_image,
    "sam": _points,
    "sam2": _objects,
    "sam2_vision_model": lambda s: {"pixel_values": s.randn(2, 3, 64, 64)},
    "sam3_detr_decoder": _detr_decoder,
    "sam3_detr_encoder": _detr_encoder,
    "sam3_lite_text_detr_decoder": _detr_decoder,
    "sam3_lite_text_detr_encoder": _detr_encoder,
    "sam3_lite_text_mask_decoder": _mask_decoder,
    "sam3_mask_decoder": _mask_decoder,
    "sam3_tracker": _points,
    "sam_hq": _points,
    "seggpt": lambda s: {
        "pixel_values": s.randn(2, 3, 16, 16), "prompt_pixel_values": s.randn(2, 3, 16, 16),
        "prompt_masks": s.randn(2, 3, 16, 16),
    },
    "shieldgemma2": lambda s: _read(s, 4, pixel_values=s.randn(2, 3, 32, 32)),
    "siglip2": lambda s: {"input_ids": s.ids(), **_flat_patches(s)},
    "siglip2_vision_model": _flat_patches,
    "speecht5": lambda s: {
        "input_values": s.randn(2, 9, 32), "decoder_input_values": s.randn(2, 7, 32)
    },
    "step3p7": lambda s: _read(s, 1, pixel_values=s.randn(2, 3, 32, 32)),
    "superglue": lambda s: {"pixel_values": s.randn(1, 2, 3, 64, 64)},
    "t5gemma2_decoder": lambda s: {
        "input_ids": s.ids(), "encoder_hidden_states": s.randn(2, 5, s.config.hidden_size)
    },
    "t5gemma2_encoder": lambda s: _read(s, 4, pixel_values=s.randn(2, 3, 32, 32)),
    "time_series_transformer": _series,
    "timesfm": lambda s: {
        "past_values": s.randn(2, 64), "past_values_padding": torch.zeros(2, 64),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda s: {
        "past_values": s.randn(2, 64), "past_values_padding": torch.zeros(2, 64)
    },
    "timm_backbone": lambda s: {"pixel_values": s.randn(2, 3, 160, 160)},
    # One video, since its column positions do not allow more.
    "tvp": lambda s: {
        "input_ids": s.ids()[:1], "pixel_values": s.randn(1, 2, 3, 64, 64),
        "attention_mask": _ones(1, s.text),
    },
    "udop": lambda s: {"input_ids": s.ids(), "bbox": s.boxes() / 10, "decoder_input_ids": s.ids(7)},
    "unlimited_ocr_vision": lambda s: {"pixel_values": s.randn(2, 3, 64, 64)},
    "unlimited_ocr_vision_encoder": lambda s: {"patch_embeds": s.randn(2, 32, 2, 2)},
    "vibevoice_acoustic_tokenizer": lambda s: {"input_values": s.randn(2, 1, 64), "sample": False},
    "vibevoice_acoustic_tokenizer_decoder": lambda s: {"hidden_states": s.randn(2, 32, 16)},
    "vibevoice_acoustic_tokenizer_encoder": lambda s: {"hidden_states": s.randn(2, 1, 64)},
    "video_llama_3_vision": lambda s: {
        "pixel_values": s.patches(), "grid_thw": s.grid(), "merge_sizes": torch.tensor([2, 2])
    },
    "videoprism": lambda s: {"input_ids": s.ids(), "pixel_values_videos": s.video()},
    "vitmatte": lambda s: {"pixel_values": s.randn(2, 4, 32, 32)},
    "vits": lambda s: {"input_ids": s.ids()},
    "voxtral_realtime": lambda s: {
        "input_ids": s.ids(), "input_features": s.randn(2, 16, 8 * s.text)
    },
    "voxtral_realtime_text": lambda s: {"input_ids": s.ids(), "t_cond": s.randn(1, 1, 32)},
    "wav2vec2-bert": lambda s: {"input_features": s.randn(2, 12, 16)},
    "xclip": lambda s: {"input_ids": s.ids(), "pixel_values": s.randn(2, 2, 3, 32, 32)},
    "xcodec2": lambda s: {
        "input_values": s.randn(2, 1, 1920), "input_features": s.randn(2, 6, 16)
    },
    "yolos": lambda s: {"pixel_values": s.randn(2, 3, 32, 32)},
}  # fmt: skip
