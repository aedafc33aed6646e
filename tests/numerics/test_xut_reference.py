"""All wirings of the network against a second implementation, written from the formulas alone.

It works on published names in float64, one head and one channel pair at a time, without batching tricks.
"""

import math

import pytest
import torch
from torch import Tensor

from hdm_lightning.interop import published
from hdm_lightning.models import XUT, XUTConfig

CONFIG = XUTConfig(
    channels=3, patch_size=2, width=24, mlp_width=20, heads=2, head_dim=12, context_width=10, depth=3,
    encoder_blocks=2, decoder_blocks=2, blocks_before=1, blocks_after=1,
)  # fmt: skip


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


class Reference:
    def __init__(self, config: XUTConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def rotated(self, x: Tensor, frequencies: Tensor, positions: Tensor) -> Tensor:
        """One head (S,d) turned pair by pair."""
        out = torch.empty_like(x)
        for i in range(x.shape[1] // 2):
            angle = positions[:, i % 2] * torch.exp(frequencies[i // 2, i % 2])
            a, b = x[:, 2 * i], x[:, 2 * i + 1]
            out[:, 2 * i] = a * torch.cos(angle) - b * torch.sin(angle)
            out[:, 2 * i + 1] = a * torch.sin(angle) + b * torch.cos(angle)
        return out

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        d, heads = self.config.head_dim, []
        for h in range(self.config.heads):
            part, frequencies = slice(h * d, (h + 1) * d), self.weights[f"{name}.rope.freqs"][h]
            query = self.rotated(q[:, part], frequencies, positions)
            key = self.rotated(k[:, part], frequencies, positions)
            heads.append(torch.softmax(query @ key.T / math.sqrt(d), dim=1) @ v[:, part])
        return self.linear(f"{name}.out", torch.cat(heads, dim=1))

    def sublayer(self, x: Tensor, norm: str, modulation: list[Tensor], f) -> Tensor:
        scale, shift, gate = modulation
        normed = x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-6) * self.weights[f"{norm}.norm.weight"]
        normed = normed * (1 + scale) + shift
        return (normed if self.config.residual == "normed" else x) + f(normed) * (1 + gate)

    def block(self, name: str, x: Tensor, p: Tensor, mods: dict, memory: Tensor | None = None) -> Tensor:
        def self_attention(n: Tensor) -> Tensor:
            return self.attention(f"{name}.attn", *self.linear(f"{name}.attn.qkv", n).chunk(3, dim=1), p)

        def cross_attention(n: Tensor) -> Tensor:
            key, value = self.linear(f"{name}.xattn.kv", memory).chunk(2, dim=1)
            return self.attention(f"{name}.xattn", self.linear(f"{name}.xattn.q", n), key, value, p)

        def feed_forward(n: Tensor) -> Tensor:
            a, b = self.linear(f"{name}.mlp.w12", n).chunk(2, dim=1)
            return self.linear(f"{name}.mlp.w3", a * torch.sigmoid(a) * b)

        if memory is not None and self.config.skips == "concatenation":
            weight, bias = (self.weights[f"{name}.memory_projection.{kind}"] for kind in ("weight", "bias"))
            width = x.shape[1]
            x = x @ weight[:, :width].T + memory @ weight[:, width:].T + bias
        x = self.sublayer(x, f"{name}.attn_pre_norm", mods["attn"], self_attention)
        if memory is not None and self.config.skips != "concatenation":
            x = self.sublayer(x, f"{name}.xattn_pre_norm", mods["xattn"], cross_attention)
        return self.sublayer(x, f"{name}.mlp_pre_norm", mods["ffw"], feed_forward)

    def modulations(self, t: float, log_aspect: float) -> dict[str, list[Tensor]]:
        width = self.config.width
        frequencies = torch.tensor([math.exp(-math.log(10000) * i / (width / 2)) for i in range(width // 2)])
        angles = 1000 * t * frequencies.double()
        time = mish(self.linear("time_emb.proj.0", torch.cat([angles.cos(), angles.sin()])))
        hidden = mish(self.linear("addon_info_embs_proj.0", torch.tensor([log_aspect], dtype=torch.float64)))
        condition = time + self.linear("addon_info_embs_proj.2", hidden)
        out = {}
        reads = self.config.skips in ("mirrored", "last")
        for kind in ("attn", "xattn", "ffw") if reads else ("attn", "ffw"):
            name = f"shared_adaln_{kind}"
            centred = (condition - condition.mean()) / torch.sqrt(condition.var(correction=0) + 1e-5)
            normed = centred * self.weights[f"{name}.0.weight"] + self.weights[f"{name}.0.bias"]
            out[kind] = list(self.linear(f"{name}.3", mish(self.linear(f"{name}.1", normed))).chunk(3))
        return out

    def velocity(self, latent: Tensor, t: float, context: Tensor, aspect: float, kept: list[int]) -> Tensor:
        """One sample (C,H,W), its own text (L,ctx) and the image tokens that pass through the U."""
        patch, (_, height, width) = self.config.patch_size, latent.shape
        rows, columns = height // patch, width // patch
        image = torch.nn.functional.conv2d(
            latent[None], self.weights["in_patch.proj.weight"], self.weights["in_patch.proj.bias"], stride=patch
        )[0].flatten(1).T  # fmt: skip
        x = torch.cat([image, self.linear("ctx_proj", context)])
        reach = (math.sqrt(rows / columns), math.sqrt(columns / rows))
        if self.config.positions == "long_side":
            reach = (rows / max(rows, columns), columns / max(rows, columns))
        grid = [
            (((2 * i + 1) / rows - 1) * reach[0], ((2 * j + 1) / columns - 1) * reach[1])
            for i in range(rows)
            for j in range(columns)
        ]
        positions = torch.tensor(grid + [(0.0, 0.0)] * len(context), dtype=torch.float64)
        mods = self.modulations(t, aspect)
        x = self.block("prev_tread_trns.blocks.0", x, positions, mods)
        inside = kept + list(range(rows * columns, len(x)))
        routed = self.u(x[inside], positions[inside], mods)
        x = x.clone()
        for place, row in zip(inside, routed, strict=True):
            x[place] = row
        x = self.block("post_tread_trns.blocks.0", x, positions, mods)
        patches = self.linear("out_patch.proj", x[: rows * columns])
        out = torch.empty_like(latent)
        for index, values in enumerate(patches.view(-1, patch, patch, self.config.channels)):
            y, xx = patch * (index // columns), patch * (index % columns)
            out[:, y : y + patch, xx : xx + patch] = values.permute(2, 0, 1)
        return out

    def u(self, x: Tensor, positions: Tensor, mods: dict) -> Tensor:
        depth, encoded = self.config.depth, []
        for d in range(depth):
            for i in range(self.config.encoder_blocks):
                x = self.block(f"backbone.enc_blocks.{d}.{i}", x, positions, mods)
            encoded.append(x)
        for d in range(depth):
            mirrored = encoded[depth - 1 - d]
            memory = {"mirrored": mirrored, "concatenation": mirrored, "last": encoded[-1]}.get(self.config.skips)
            for i in range(self.config.decoder_blocks):
                name = f"backbone.dec_blocks.{d}.{i}"
                x = self.block(name, x, positions, mods, memory if i == 0 else None)
        return x


def reference_weights(model: XUT) -> dict[str, Tensor]:
    """The network's tensors under published names, and the projections of a concatenation under names of the kind."""
    config, state = model.config, model.state_dict()
    joined = {name: state.pop(name) for name in list(state) if "memory_projection" in name}
    named = {published.published_name(name): tensor for name, tensor in state.items()}
    patches = (config.width, config.channels, config.patch_size, config.patch_size)
    named["in_patch.proj.weight"] = named["in_patch.proj.weight"].reshape(patches)
    return named | {name.replace("decoder.", "backbone.dec_blocks."): tensor for name, tensor in joined.items()}


@pytest.mark.parametrize("residual", ["input", "normed"])
@pytest.mark.parametrize("skips", ["mirrored", "last", "none", "concatenation"])
@pytest.mark.parametrize("positions", ["area", "long_side"])
def test_every_wiring_agrees_with_a_second_implementation(residual: str, skips: str, positions: str) -> None:
    torch.manual_seed(3)
    wiring = {"residual": residual, "skips": skips, "positions": positions}
    model = XUT(XUTConfig.from_json(CONFIG.to_json() | wiring)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    latent, context = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 5, 10).double()
    t, aspect = torch.tensor([0.3, 0.9]).double(), torch.tensor([0.4, -0.7]).double()
    lengths, kept = [5, 2], [[0, 3, 4, 7], [1, 2, 3, 6]]
    with torch.no_grad():
        found = model(
            latent, t, context, context_lengths=torch.tensor(lengths), log_aspect_ratio=aspect, keep=torch.tensor(kept)
        )
        reference = Reference(model.config, reference_weights(model))
        for i in range(2):
            expected = reference.velocity(latent[i], float(t[i]), context[i, : lengths[i]], float(aspect[i]), kept[i])
            error = (found[i] - expected).norm() / expected.norm()
            assert error < 1e-6, (i, error)
