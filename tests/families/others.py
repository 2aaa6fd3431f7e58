"""Families of MONAI, torchvision, timm, diffusers and sentence-transformers."""

import functools

import torch
from torch import nn

from .subject import family
from .torch_models import torch_families

# -- MONAI


def monai_families():
    def net(name):
        def make(**settings):
            from monai.networks import nets

            return getattr(nets, name)(**settings).eval()

        return make

    make = functools.partial(family, library="monai")
    volume = {"inputs": lambda: {"x_in": torch.randn(1, 1, 32, 16, 16)}}
    found = [
        make(
            "UNETR",
            make=functools.partial(
                net("UNETR"), in_channels=1, out_channels=2, img_size=(32, 16, 16), feature_size=4,
                hidden_size=48, mlp_dim=96, num_heads=4,
            ),
            **volume,
        ),
        make(
            "SwinUNETR",
            make=functools.partial(
                net("SwinUNETR"), in_channels=1, out_channels=2, feature_size=12,
                depths=(2, 2, 1, 1), num_heads=(2, 2, 4, 4),
            ),
            inputs=lambda: {"x_in": torch.randn(1, 1, 64, 32, 32)},
            often=False,
        ),
        make(
            "SwinUNETR of images",
            make=functools.partial(
                net("SwinUNETR"), in_channels=1, out_channels=2, feature_size=12,
                depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), spatial_dims=2, use_v2=True,
            ),
            inputs=lambda: {"x_in": torch.randn(1, 1, 64, 64)},
        ),
        make(
            "ViT",
            make=functools.partial(
                net("ViT"), in_channels=1, img_size=(16, 16, 16), patch_size=8, hidden_size=24,
                mlp_dim=48, num_layers=2, num_heads=4, classification=True, num_classes=3,
            ),
            inputs=lambda: {"x": torch.randn(2, 1, 16, 16, 16)},
        ),
        make(
            "ViTAutoEnc",
            make=functools.partial(
                net("ViTAutoEnc"), in_channels=1, img_size=(16, 16), patch_size=(4, 4),
                hidden_size=24, mlp_dim=48, num_layers=2, num_heads=4, spatial_dims=2,
            ),
            inputs=lambda: {"x": torch.randn(2, 1, 16, 16)},
        ),
        make(
            "DiffusionModelUNet",
            make=functools.partial(
                net("DiffusionModelUNet"), spatial_dims=2, in_channels=1, out_channels=1,
                channels=(8, 16), attention_levels=(False, True), num_res_blocks=1,
                num_head_channels=8, norm_num_groups=4, with_conditioning=True,
                cross_attention_dim=12,
            ),
            inputs=lambda: {
                "x": torch.randn(2, 1, 16, 16), "timesteps": torch.tensor([3, 90]),
                "context": torch.randn(2, 4, 12),
            },
        ),
        make(
            "DecoderOnlyTransformer",
            make=functools.partial(
                net("DecoderOnlyTransformer"), num_tokens=20, max_seq_len=12, attn_layers_dim=16,
                attn_layers_depth=2, attn_layers_heads=4,
            ),
            inputs=lambda: {"x": torch.randint(20, (2, 9))},
        ),
    ]  # fmt: skip
    return found


# -- torchvision


@functools.cache
def operators_of_torchvision():
    """Declares two operators of torchvision, if its own library needs CUDA and torch has none.

    Without them nothing could import torchvision there, neither transformers nor timm. No model
    here calls the operators.
    """
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("torchvision")
    if found is None:
        return
    root = Path(found.origin).parent
    try:
        torch.ops.load_library(next(root.glob("_C*.so")))
    except OSError:
        DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            DECLARED[-1].define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")


#: Keeps the library alive, since its operators would disappear with it.
DECLARED = []


def torchvision_families():
    def make_model(path, **settings):
        def make():
            import torchvision

            found = torchvision.models
            for part in path.split("."):
                found = getattr(found, part)
            return found(**settings).eval()

        return make

    make = functools.partial(family, library="torchvision")
    image = {"inputs": lambda: {"x": torch.randn(2, 3, 32, 32)}}
    swin = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    swin["num_classes"] = 5
    vit = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 24}
    vit |= {"mlp_dim": 48, "num_classes": 5}

    def swin_v2():
        import torchvision.models.swin_transformer as s

        return s.SwinTransformer(
            patch_size=[4, 4], block=s.SwinTransformerBlockV2,
            downsample_layer=s.PatchMergingV2, **swin,
        ).eval()  # fmt: skip

    def maxvit():
        from torchvision.models.maxvit import MaxVit

        return MaxVit(
            input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8, 16],
            block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=5,
        ).eval()  # fmt: skip

    def detector():
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

        return nn.Sequential(TwoMLPHead(4 * 4, 16), FastRCNNPredictor(16, 5)).eval()

    return [
        make("vit", make=make_model("vision_transformer.VisionTransformer", **vit), **image),
        make(
            "swin",
            make=make_model("swin_transformer.SwinTransformer", patch_size=[4, 4], **swin),
            **image,
        ),
        make("swin_v2", make=swin_v2, **image),
        make("maxvit", make=maxvit, **image),
        make(
            "heads of detection", make=detector, inputs=lambda: {"input": torch.randn(6, 4, 2, 2)}
        ),
    ]


# -- timm

SMALL = {"img_size": 32, "num_classes": 5}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {**SMALL, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MLP = {**SMALL, "patch_size": 8, "embed_dim": 24, "num_blocks": 2}
STAGES = {"num_classes": 5, "depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
ALONE = "the only slice of its shape"
#: Architecture -> settings that make it tiny.
TIMM = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT,
    "cait_xxs24_224": VIT,
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5},
    "xcit_nano_12_p16_224": {**VIT, "patch_size": 16},
    "mlp_mixer.MlpMixer": MLP,
    "mlp_mixer.MlpMixer, affine": {
        **MLP, "mlp_ratio": 4, "block_layer": "ResBlock", "norm_layer": "Affine"
    },
    "mlp_mixer.MlpMixer, gated": {
        **MLP, "block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp", "mlp_ratio": 4
    },
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "convnext_tiny": STAGES,
    "convnextv2_tiny": STAGES,
    "maxvit_rmlp_pico_rw_256": SMALL,
    "coatnet_0_224": SMALL,
    "levit_128s": {"num_classes": 5},
    "visformer_tiny": {**SMALL, "embed_dim": 48},
    "volo.VOLO": {
        **SMALL, "embed_dims": (16, 32, 32, 32), "layers": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2),
        "patch_size": 8, "downsamples": (True, False, False, False),
        "outlook_attention": (True, False, False, False), "post_layers": ("ca", "ca"),
    },
    "twins_svt_small": {
        **SMALL, "embed_dims": (16, 32, 32, 32), "depths": (2, 2, 2, 2), "num_heads": (2, 2, 2, 2)
    },
    "pvt_v2_b0": {"num_classes": 5},
    "mobilevit_xxs": {"num_classes": 5},
    "efficientformer_l1": {"num_classes": 5},
    "nest.Nest": {
        **SMALL, "embed_dims": (16, 32, 32), "depths": (1, 1, 2), "num_heads": (2, 2, 2)
    },
    "poolformerv2_s12": {"num_classes": 5},
    "edgenext_xx_small": {"num_classes": 5},
    "hiera_tiny_224": {"num_classes": 5, "embed_dim": 16},
}  # fmt: skip
#: Models that cannot be made smaller, or whose layers are like those of other models.
TIMM_SELDOM = {
    "maxvit_rmlp_pico_rw_256", "coatnet_0_224", "levit_128s", "pvt_v2_b0", "mobilevit_xxs",
    "efficientformer_l1", "hiera_tiny_224", "deit3_small_patch16_224", "beitv2_base_patch16_224",
    "poolformerv2_s12", "edgenext_xx_small", "visformer_tiny",
}  # fmt: skip
TIMM_REFUSED = {"coatnet_0_224", "visformer_tiny", "poolformerv2_s12"}


def timm_families():
    def make(name, settings):
        import timm

        if "." in name:  # a class, because its named models cannot be made smaller
            module, _, kind = name.partition(", ")[0].partition(".")
            module = getattr(timm.models, module)
            settings = {
                key: getattr(module, value) if key.endswith("_layer") else value
                for key, value in settings.items()
            }
            return getattr(module, kind)(**settings).eval()
        return timm.create_model(name, pretrained=False, **settings).eval()

    def inputs(name):
        size = 224 if name in ("levit_128s", "hiera_tiny_224", "efficientformer_l1") else 32
        return {"x": torch.randn(1 if size == 224 else 2, 3, size, size)}

    return [
        family(
            name,
            "timm",
            functools.partial(make, name, settings),
            functools.partial(inputs, name),
            refused=ALONE if name in TIMM_REFUSED else "",
            often=name not in TIMM_SELDOM,
        )
        for name, settings in TIMM.items()
    ]


# -- diffusers


def diffusers_families():
    def model(name, **settings):
        def make():
            import diffusers

            diffusers.logging.set_verbosity_error()
            return getattr(diffusers, name)(**settings).eval()

        return make

    make = functools.partial(family, library="diffusers")
    dit = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}

    def noisy(**more):
        return lambda: {
            "sample": torch.randn(2, 3, 16, 16),
            "timestep": torch.tensor([3, 90]),
            **more,
        }

    def latents(**more):
        timestep = torch.tensor([3, 9])
        return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": timestep, **more}

    return [
        make(
            "UNet2DModel",
            make=model(
                "UNet2DModel", sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
                norm_num_groups=4, attention_head_dim=8,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            ),
            inputs=noisy(),
        ),
        make(
            "UNet2DConditionModel",
            make=model(
                "UNet2DConditionModel", sample_size=16, in_channels=3, out_channels=3,
                block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
                attention_head_dim=4, cross_attention_dim=12,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            inputs=lambda: noisy(encoder_hidden_states=torch.randn(2, 5, 12))(),
        ),
        make(
            "DiTTransformer2DModel",
            make=model(
                "DiTTransformer2DModel", sample_size=8, patch_size=2, num_embeds_ada_norm=10,
                norm_num_groups=4, **dit,
            ),
            inputs=lambda: latents(class_labels=torch.tensor([1, 2])),
        ),
        make(
            "Transformer2DModel",
            make=model(
                "Transformer2DModel", norm_num_groups=4, cross_attention_dim=12, **dit
            ),
            inputs=lambda: {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(2, 5, 12),
            },
        ),
        make(
            "PixArtTransformer2DModel",
            make=model(
                "PixArtTransformer2DModel", sample_size=8, patch_size=2, cross_attention_dim=16,
                caption_channels=12, **dit,
            ),
            inputs=lambda: latents(
                encoder_hidden_states=torch.randn(2, 5, 12),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ),
        ),
        make(
            "SD3Transformer2DModel",
            make=model(
                "SD3Transformer2DModel", sample_size=8, patch_size=2, joint_attention_dim=12,
                caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
                pos_embed_max_size=8, **dit,
            ),
            inputs=lambda: latents(
                encoder_hidden_states=torch.randn(2, 5, 12), pooled_projections=torch.randn(2, 10)
            ),
        ),
        make(
            "FluxTransformer2DModel",
            make=model(
                "FluxTransformer2DModel", patch_size=1, joint_attention_dim=12,
                pooled_projection_dim=10, num_single_layers=1, axes_dims_rope=(2, 2, 4), **dit,
            ),
            inputs=lambda: {
                "hidden_states": torch.randn(1, 16, 4), "timestep": torch.tensor([3.0]),
                "encoder_hidden_states": torch.randn(1, 5, 12),
                "pooled_projections": torch.randn(1, 10),
                "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
            },
        ),
        make(
            "UVit2DModel",
            make=model(
                "UVit2DModel", hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4,
                micro_cond_embed_dim=12, encoder_hidden_size=12, vocab_size=30, codebook_size=24,
                block_out_channels=16, in_channels=16, num_attention_heads=2, num_hidden_layers=2,
                block_num_heads=2, num_res_blocks=1, sample_size=8, intermediate_size=24,
            ),
            inputs=lambda: {
                "input_ids": torch.randint(24, (2, 8, 8)),
                "encoder_hidden_states": torch.randn(2, 5, 12),
                "pooled_text_emb": torch.randn(2, 8), "micro_conds": torch.rand(2, 3),
            },
        ),
        make(
            "AutoencoderKL",
            make=model(
                "AutoencoderKL", block_out_channels=(8, 16), norm_num_groups=4, sample_size=16,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            inputs=lambda: {"sample": torch.randn(2, 3, 16, 16)},
        ),
        make(
            "PriorTransformer",
            make=model(
                "PriorTransformer", num_attention_heads=2, attention_head_dim=8, num_layers=2,
                embedding_dim=12, num_embeddings=7,
            ),
            inputs=lambda: {
                "hidden_states": torch.randn(2, 12), "timestep": torch.tensor([3, 9]),
                "proj_embedding": torch.randn(2, 12),
                "encoder_hidden_states": torch.randn(2, 7, 12),
            },
        ),
    ]  # fmt: skip


# -- sentence-transformers


def sentence_families():
    def bert():
        import sentence_transformers
        import transformers
        from sentence_transformers import models

        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=32,
        )  # fmt: skip
        body = Body(transformers.BertModel(config))
        pooling = models.Pooling(16, pooling_mode="mean")
        dense = [models.Dense(16, 16), models.Dense(16, 16), models.Normalize()]
        return sentence_transformers.SentenceTransformer(
            modules=[body, pooling, *dense], device="cpu"
        ).eval()

    def inputs():
        mask = (torch.arange(9) < torch.tensor([[9], [5]])).long()
        return {"input": {"input_ids": torch.randint(50, (2, 9)), "attention_mask": mask}}

    return [family("SentenceTransformer", "sentence_transformers", bert, inputs)]


class Body(nn.Module):
    """The transformer of a sentence model; the library itself can only make one from a name."""

    def __init__(self, auto_model):
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features):
        mask = features["attention_mask"]
        hidden = self.auto_model(features["input_ids"], attention_mask=mask).last_hidden_state
        return {**features, "token_embeddings": hidden}


def families():
    """All families of this file; their libraries are imported when a model is built."""
    return [
        *torch_families(),
        *monai_families(),
        *torchvision_families(),
        *timm_families(),
        *diffusers_families(),
        *sentence_families(),
    ]
