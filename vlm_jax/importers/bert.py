"""BERT's layers and timm's ViT under the names that ALBEF, BLIP and Hugging Face give them."""

from __future__ import annotations

from vlm_jax.importers.open_clip import linear, norm
from vlm_jax.weight_rules import Rule


def attention(target: str, source: str) -> tuple[Rule, ...]:
    """``source`` has ``self.{query,key,value}`` and ``output.dense``."""
    rules: list[Rule] = []
    for role in ("query", "key", "value"):
        rules += [(f"{target}/{role}/kernel", f"{source}.self.{role}.weight", "to_heads"), (f"{target}/{role}/bias", f"{source}.self.{role}.bias", "heads")]
    return (*rules, (f"{target}/out/kernel", f"{source}.output.dense.weight", "from_heads"), (f"{target}/out/bias", f"{source}.output.dense.bias", "copy"))


def layers(target: str, source: str, first: int = 0) -> tuple[Rule, ...]:
    """A stack of layers that starts at layer ``first`` of ``source`` ("...encoder.layer")."""
    layer = f"{source}.{{layer+{first}}}"
    return (*attention(f"{target}/attn", f"{layer}.attention"), *norm(f"{target}/norm1", f"{layer}.attention.output.LayerNorm"),
            *attention(f"{target}/cross", f"{layer}.crossattention"), *norm(f"{target}/norm_cross", f"{layer}.crossattention.output.LayerNorm"),
            *linear(f"{target}/mlp/up", f"{layer}.intermediate.dense"), *linear(f"{target}/mlp/down", f"{layer}.output.dense"),
            *norm(f"{target}/norm2", f"{layer}.output.LayerNorm"))


def embeddings(target: str, source: str) -> tuple[Rule, ...]:
    return ((f"{target}/token_embed/table", f"{source}.word_embeddings.weight", "copy"), (f"{target}/position_embed", f"{source}.position_embeddings.weight", "copy"),
            (f"{target}/type_embed", f"{source}.token_type_embeddings.weight", "copy"), *norm(f"{target}/embed_norm", f"{source}.LayerNorm"))


def language_head(target: str, source: str) -> tuple[Rule, ...]:
    """``source``: "...cls.predictions"."""
    return (*linear(f"{target}/dense", f"{source}.transform.dense"), *norm(f"{target}/norm", f"{source}.transform.LayerNorm"), (f"{target}/bias", f"{source}.bias", "copy"))


def timm_vit(target: str, source: str, resize: str = "resize_positions_border") -> tuple[Rule, ...]:
    layer = f"{source}.blocks.{{layer}}"
    rules: list[Rule] = []
    for i, role in enumerate(("query", "key", "value")):
        rules += [(f"{target}/blocks/attn/{role}/kernel", f"{layer}.attn.qkv.weight[{i}/3]", "to_heads"),
                  (f"{target}/blocks/attn/{role}/bias", f"{layer}.attn.qkv.bias[{i}/3]", "heads")]
    return ((f"{target}/class_embed", f"{source}.cls_token", "class_row"), (f"{target}/position_embed", f"{source}.pos_embed", f"batched_{resize}"),
            (f"{target}/patch_embed/projection/kernel", f"{source}.patch_embed.proj.weight", "patches"), (f"{target}/patch_embed/projection/bias", f"{source}.patch_embed.proj.bias", "copy"),
            *norm(f"{target}/blocks/norm1", f"{layer}.norm1"), *rules,
            (f"{target}/blocks/attn/out/kernel", f"{layer}.attn.proj.weight", "from_heads"), (f"{target}/blocks/attn/out/bias", f"{layer}.attn.proj.bias", "copy"),
            *norm(f"{target}/blocks/norm2", f"{layer}.norm2"), *linear(f"{target}/blocks/mlp/up", f"{layer}.mlp.fc1"), *linear(f"{target}/blocks/mlp/down", f"{layer}.mlp.fc2"),
            *norm(f"{target}/output_norm", f"{source}.norm"))
