"""What others would use for the same task: Hugging Face's ViTMAE and PyTorch's own encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roma_core.model.config import EncoderConfig


def hugging_face_mae(stack: EncoderConfig, decoder: EncoderConfig) -> nn.Module | None:
    """``ViTMAEForPreTraining`` of the same sizes on 224 × 224 × 3 images; None if not installed."""
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        return None
    config = ViTMAEConfig(
        hidden_size=stack.d_model,
        num_hidden_layers=stack.depth,
        num_attention_heads=stack.nhead,
        intermediate_size=stack.mlp_width,
        decoder_hidden_size=decoder.d_model,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.nhead,
        decoder_intermediate_size=decoder.mlp_width,
        mask_ratio=0.75,
        image_size=224,
        patch_size=16,
    )
    return ViTMAEForPreTraining(config)


class TorchClassifier(nn.Module):
    """``nn.TransformerEncoder`` on padded rows with a key mask; positions are added as features."""

    def __init__(self, stack: EncoderConfig, width: int, n_axes: int, dim_output: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            stack.d_model,
            stack.nhead,
            stack.mlp_width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        self.projection = nn.Linear(width + n_axes, stack.d_model)
        self.cls = nn.Parameter(torch.zeros(stack.d_model))
        self.encoder = nn.TransformerEncoder(layer, stack.depth, enable_nested_tensor=False)
        self.head = nn.Linear(stack.d_model, dim_output)

    def forward(self, tokens: Tensor, positions: Tensor, pad_mask: Tensor) -> Tensor:
        """``(B, N, P)``, ``(B, D, N)``, ``(B, N)`` → ``(B, dim_output)``."""
        x = self.projection(torch.cat((tokens, positions.transpose(1, 2)), -1))
        x = torch.cat((self.cls.expand(len(x), 1, -1), x), 1)
        no_pad = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        pad = torch.cat((no_pad, pad_mask), 1)
        return self.head(self.encoder(x, src_key_padding_mask=pad)[:, 0])
