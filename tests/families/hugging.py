"""Families of transformers: a tiny model of every type that has linear layers."""

import csv
import importlib
import inspect
import re
from pathlib import Path

import torch

from .calls import CALLS
from .parts import Later
from .settings import COMPILED, JUMPING, MODELS, OFTEN, REFUSED, SETTINGS
from .shrink import tiny
from .subject import Family, tensors_of
from .weights import randomise

#: Each type with its way of calling, or with the reason why it is not checked; see `survey.py`.
TABLE = Path(__file__).with_name("hugging.csv")


def config_class(kind):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


def model_class(kind):
    """The base model of a type; parts have no such name, so for them the model of their config."""
    import transformers
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if kind in MODELS:
        return getattr(transformers, MODELS[kind])
    cls = config_class(kind)
    if cls in MODEL_MAPPING:
        try:
            found = MODEL_MAPPING[cls]
        except ValueError:  # a name that transformers does not export
            found = ()
        if found:
            return found[0] if isinstance(found, tuple) else found
    module = importlib.import_module(cls.__module__.replace(".configuration_", ".modeling_"))
    models = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and getattr(c, "config_class", None) is cls
        and "PreTrainedModel" not in c.__name__
        and c.__module__ == module.__name__
    ]
    if not models:
        raise LookupError(f"no model of {cls.__name__} in {module.__name__}")
    return min(models, key=lambda c: len(c.__name__))


def _made(settings):
    """Settings, where those of class `Later` are made now."""
    if isinstance(settings, Later):
        return settings.make()
    if isinstance(settings, dict):
        return {name: _made(value) for name, value in settings.items()}
    return settings


def config_of(kind):
    return tiny(config_class(kind), _made(SETTINGS.get(kind, {})))


def builder(kind):
    """``build(seed)`` of `check_family` for a type."""

    def build(seed):
        config, cls = config_of(kind), model_class(kind)
        torch.manual_seed(seed)
        return randomise(cls._from_config(config).float().eval(), seed)

    return build


# -- inputs


class Sample:
    """Tensors of every kind that a forward may need, in the sizes of a config."""

    def __init__(self, config, text=9):
        self.config, self.text = config, text
        self.generator = torch.Generator().manual_seed(7)

    def setting(self, *names, default=None):
        """The value of the first of these settings that the config or one of its parts has."""
        parts = [self.config, *(p for p in vars(self.config).values() if hasattr(p, "to_dict"))]
        for name in names:
            for part in parts:
                value = getattr(part, name, None)
                if value is not None:
                    return value
        return default

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def ids(self, length=None):
        return torch.randint(3, 40, (2, length or self.text), generator=self.generator)

    def image(self):
        size = self.setting("image_size", "img_size", default=32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = self.setting("num_channels", "in_channels", "in_chans", default=3)
        return self.randn(2, channels, height, width)

    def video(self):
        frames = self.setting("num_frames", default=2)
        image = self.image()
        return self.randn(image.shape[0], frames, *image.shape[1:])

    def hidden(self):
        width = self.setting("hidden_size", "d_model", "embed_dim", "n_embd", default=32)
        return self.randn(2, self.text, width)

    def features(self):
        """Spectrograms (batch, bins, frames), twice as long as the positions if these are known."""
        bins = self.setting("num_mel_bins", "feature_size", "input_feat_per_channel", default=16)
        frames = 2 * self.setting("max_source_positions", default=16)
        return self.randn(2, bins, frames)

    def features_last(self):
        return self.features().mT.contiguous()

    def wave(self):
        return self.randn(2, 2000)

    def patches(self):
        """Flat patches of two images of 4 x 4 patches."""
        patch = self.setting("patch_size", default=8)
        patch = patch[-1] if isinstance(patch, list | tuple) else patch
        temporal = self.setting("temporal_patch_size", default=1)
        channels = self.setting("in_channels", "in_chans", "num_channels", default=3)
        return self.randn(32, channels * temporal * patch * patch)

    def grid(self):
        return torch.tensor([[1, 4, 4], [1, 4, 4]])

    def boxes(self):
        return torch.tensor([1, 2, 5, 9]).expand(2, self.text, 4).clone()


def _text(s):
    return {"input_ids": s.ids()}


def _images(s):
    return {"pixel_values": s.image()}


#: Ways of calling a model, tried in this order; the first that runs is used.
WAYS = {
    "text": _text,
    "text to text": lambda s: {"input_ids": s.ids(), "decoder_input_ids": s.ids(7)},
    "image": _images,
    "video": lambda s: {"pixel_values": s.video()},
    "videos": lambda s: {"pixel_values_videos": s.video()},
    "image and text": lambda s: {"input_ids": s.ids(), "pixel_values": s.image()},
    "spectrogram": lambda s: {"input_features": s.features()},
    "spectrogram, frames first": lambda s: {"input_features": s.features_last()},
    "spectrogram to text": lambda s: {
        "input_features": s.features(), "decoder_input_ids": s.ids(7)
    },
    "frames to text": lambda s: {
        "input_features": s.features_last(), "decoder_input_ids": s.ids(7)
    },
    "wave": lambda s: {"input_values": s.wave()},
    "waves of channels": lambda s: {"input_values": s.wave()[:, None]},
    "wave to text": lambda s: {"input_values": s.wave(), "decoder_input_ids": s.ids(7)},
    "patches": lambda s: {"hidden_states": s.patches(), "grid_thw": s.grid()},
    "patches of pixels": lambda s: {"pixel_values": s.patches(), "grid_thw": s.grid()},
    "patches of images": lambda s: {"pixel_values": s.patches(), "image_grid_thw": s.grid()},
    "boxes": lambda s: {"input_ids": s.ids(), "bbox": s.boxes()},
    "embeddings": lambda s: {"inputs_embeds": s.hidden()},
    "hidden": lambda s: {"hidden_states": s.hidden()},
    "image and decoder": lambda s: {"pixel_values": s.image(), "decoder_input_ids": s.ids(7)},
}  # fmt: skip


#: Paths of files, which differ between machines.
PATH = re.compile(r"(?:[A-Za-z]:|~)?(?:[/\\][\w.+~-]+){2,}[/\\]?")


def in_short(error):
    """An error for the table: one line of at most 160 characters, without paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An ImportError names the missing library in its first line; other errors end with the cause.
    which = 0 if isinstance(error, ImportError) else -1
    line = PATH.sub("a file", lines[which] if lines else "")
    return f"{type(error).__name__}: {line}"[:160]


#: The way of calling the types in `CALLS`.
OWN = "inputs of its own"


def find_way(kind, model):
    """The name of the first way of calling that runs, and the errors of the others."""
    said = {}
    accepted = set(inspect.signature(model.forward).parameters)
    for name in [OWN] if kind in CALLS else WAYS:
        inputs = (CALLS[kind] if name == OWN else WAYS[name])(Sample(model.config))
        if name != OWN and not set(inputs) <= accepted:
            continue
        try:
            with torch.no_grad():
                tensors = tensors_of(model(**inputs))
        except Exception as error:
            said[name] = in_short(error)
            continue
        if any(t.is_floating_point() and t.numel() for t in tensors):
            return name, said
        said[name] = "no output"
    return None, said


def inputs_of(kind, way):
    """``inputs()`` of `check_family` for a type and a way of calling it."""

    def inputs():
        return (CALLS[kind] if way == OWN else WAYS[way])(Sample(config_of(kind)))

    return inputs


def rows():
    """Type -> (way of calling, reason why it is not checked), for all types of transformers."""
    with TABLE.open(newline="") as file:
        return {kind: (way, reason) for kind, way, reason in csv.reader(file)}


def families():
    """All types that can be called."""
    return [
        Family(
            kind,
            "transformers",
            builder(kind),
            inputs_of(kind, way),
            way=way,
            smooth=kind not in JUMPING,
            compiles=kind in COMPILED,
            refused=REFUSED.get(kind, ""),
            often=kind in OFTEN,
        )
        for kind, (way, _) in rows().items()
        if way
    ]
