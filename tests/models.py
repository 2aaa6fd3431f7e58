"""Small models with the kinds of layers that are adapted."""

from torch import nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """A fused q, k, v projection of three slices and an output projection of one."""

    def __init__(self, width):
        super().__init__()
        self.out_proj = nn.Linear(width, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out_proj((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)


class Block(nn.Module):
    """Attention and a two-layer perceptron."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width)
        self.norm = nn.BatchNorm1d(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(self.norm(x.mT).mT)


class Tiny(nn.Module):
    """Three blocks between an embedding and a head, like the models for this package."""

    def __init__(self, width=8, blocks=3, classes=5):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Checkpointed(nn.Module):
    """A `Tiny` with its blocks checkpointed, always."""

    def __init__(self, model, use_reentrant=True):
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x):
        h = self.model.embed(x)
        for block in self.model.blocks:
            h = checkpoint(block, h, use_reentrant=self.use_reentrant)
        return self.model.head(h.mean(1))
