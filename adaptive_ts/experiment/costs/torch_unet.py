"""The U-Net of `models.unet` in PyTorch, to be measured beside it.

Nothing else imports this module: PyTorch is in the extra [parity]. Its state dict has the names of
the paper's code, which ``models.convert.from_torch("unet", ...)`` reads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaptive_ts.experiment.config.groups import ModelConfig


class Norm(nn.GroupNorm):
    """Group normalisation in float32; as many groups as divide both the wish and the channels."""

    def __init__(self, groups: int, channels: int):
        super().__init__(math.gcd(groups, channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Like ``x``, float32."""
        return super().forward(x.float())


class ResBlock(nn.Module):
    """norm, SiLU, conv, plus the embedded timestep, norm, SiLU, dropout, conv, plus the input."""

    def __init__(self, inputs: int, channels: int, embedded: int, c: ModelConfig):
        super().__init__()
        self.norm1 = Norm(c.groups, inputs)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.fc = nn.Linear(embedded, channels)
        self.norm2 = Norm(c.groups, channels)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(b, inputs, H, W) -> (b, channels, H, W)."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.fc(functional.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, channels: int, c: ModelConfig):
        super().__init__()
        self.norm = Norm(c.groups, channels)
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Like ``x``."""
        b, c, height, width = x.shape
        qkv = self.project_in(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, -1, 3 * c)
        h = functional.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.project_out(h.reshape(b, height, width, c).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """(x (b, C, H, W), t (b,)) -> (b, C, H, W) float32.

    Args:
      c: as ``models.unet.UNet`` takes its fields; ``dtype`` is left to ``torch.autocast``, and
        ``remat`` is not known here.
      image_channels: C.

    Source: Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """

    def __init__(self, c: ModelConfig, image_channels: int):
        super().__init__()
        widths, embedded = [c.channels * m for m in c.multipliers], 4 * c.channels
        self.embed = nn.Sequential(
            nn.Linear(c.channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded)
        )
        half = c.channels // 2
        frequency = torch.exp(-math.log(10000) / max(half - 1, 1) * torch.arange(half).double())
        self.register_buffer("frequency", frequency.float(), persistent=False)
        self.in_conv = nn.Conv2d(image_channels, c.channels, 3, padding=1)
        self.downsamples, self.upsamples = nn.ModuleDict(), nn.ModuleDict()
        skips = [c.channels]
        for level, width in enumerate(widths):
            blocks = nn.ModuleList()
            for _ in range(c.res_blocks):
                blocks.append(_block(skips[-1], width, embedded, c, c.attention[level]))
                skips.append(width)
            if level < len(widths) - 1:
                pad = nn.ZeroPad2d((0, 1, 0, 1))  # JAX's SAME, of an even side
                blocks.append(nn.Sequential(pad, nn.Conv2d(width, width, 3, stride=2)))
                skips.append(width)
            self.downsamples[f"level_{level}"] = blocks
        last = widths[-1]
        self.middle = nn.ModuleList(
            [
                ResBlock(last, last, embedded, c),
                Attention(last, c),
                ResBlock(last, last, embedded, c),
            ]
        )
        below = last
        for level in reversed(range(len(widths))):
            blocks, width = nn.ModuleList(), widths[level]
            for _ in range(c.res_blocks + 1):
                blocks.append(_block(below + skips.pop(), width, embedded, c, c.attention[level]))
                below = width
            if level > 0:
                conv = nn.Conv2d(width, width, 3, padding=1)
                blocks.append(nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv))
            self.upsamples[f"level_{level}"] = blocks
        out = nn.Conv2d(widths[0], image_channels, 3, padding=1)
        self.out_conv = nn.Sequential(Norm(c.groups, widths[0]), nn.SiLU(), out)
        _initialise(self)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction."""
        angle = t.float()[:, None] * self.frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
        embedding = self.embed(functional.pad(embedding, (0, self.embed[0].in_features % 2)))
        h = self.in_conv(x)
        skips = [h]
        for blocks in self.downsamples.values():
            for block in blocks:
                h = _apply(block, h, embedding)
                skips.append(h)
        for block in self.middle:
            h = _apply(block, h, embedding)
        for blocks in self.upsamples.values():
            for block in blocks:
                if not isinstance(block, nn.Sequential):
                    h = torch.cat([h, skips.pop()], dim=1)
                h = _apply(block, h, embedding)
        return self.out_conv(h).float()


def _block(inputs: int, width: int, embedded: int, c: ModelConfig, attention: bool) -> nn.Module:
    block = ResBlock(inputs, width, embedded, c)
    return nn.ModuleList([block, Attention(width, c)]) if attention else block


def _apply(block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    if isinstance(block, nn.ModuleList):
        return block[1](block[0](h, embedding))
    return block(h, embedding) if isinstance(block, ResBlock) else block(h)


def _initialise(model: UNet) -> None:
    """As ours: uniform by fan in and out, and nothing from the last layer of a branch."""
    zero = ("conv2", "project_out", "out_conv.2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(zero):
                nn.init.zeros_(module.weight)
