"""Small random models of the official packages, with inputs and what they answer. Needs the [parity] extra (torch)."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import open_clip
import torch
from torch.nn import functional as F

VISION = dict(image_size=24, patch_size=6, width=24, head_width=8, layers=2)
GENERATED = 9     # ids of a generated caption
TEXT = dict(context_length=12, vocab_size=60, width=16, heads=2, layers=2)


def draw(model, seed):
    """Random weights with every norm, bias and statistic away from its neutral value, rounded to what fp16 holds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if not x.is_floating_point() or name.endswith(("attn_mask", "logit_scale", "logit_bias")):
                continue
            noise = torch.randn(x.shape, generator=generator)
            fan_in = x[0].numel() if x.ndim > 1 else 1
            if name.endswith("running_var"):
                new = 1 + 0.3 * noise.abs()
            elif x.ndim > 1:
                # [vocab, width] and [positions, width] tables of order 1, so that no tower's answer is all bias
                new = noise * (0.5 if "embedding" in name or "query" in name else fan_in ** -0.5)
            else:
                new = (1 if name.endswith("weight") else 0) + 0.2 * noise
            x.copy_(new.half().float())
        if getattr(model, "logit_scale", None) is not None:
            model.logit_scale.copy_(torch.full_like(model.logit_scale, 2.25))
    return model.eval()


def inputs(size, length, vocab, eos, seed, lengths, pad=0, channels=3):
    """(image float [b, 3, h, w], already normalised, ids [b, l]); captions of ``lengths`` ids, the last one the end."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((len(lengths), channels, size, size)).astype(np.float32)
    ids = np.full((len(lengths), length), pad, np.int64)
    for row, n in zip(ids, lengths):
        row[:n] = rng.integers(1, vocab - 2, n)
        row[0], row[n - 1] = vocab - 2, eos
    return torch.from_numpy(image), torch.from_numpy(ids)


def clip_answers(model, image, ids):
    tokens = {}
    hooks = []
    if hasattr(model.visual, "transformer"):
        hooks.append(model.visual.transformer.register_forward_hook(lambda m, a, y: tokens.update(image=y)))
    hooks.append(model.transformer.register_forward_hook(lambda m, a, y: tokens.update(text=y)) if hasattr(model, "transformer")
                 else model.text.transformer.register_forward_hook(lambda m, a, y: tokens.update(text=y)))
    out = dict(image_embed=model.encode_image(image, normalize=True), text_embed=model.encode_text(ids, normalize=True),
               logit_scale=model.logit_scale.exp().reshape(()))
    for hook in hooks:
        hook.remove()
    return {**out, **tokens}


def coca_answers(model, image, ids):
    out = model(image, ids, output_labels=False)     # all rows: with labels it drops the last one
    if not open_clip.coca_model._has_transformers:
        raise SystemExit("open_clip's generate needs transformers below 4.57 (BeamSearchScorer)")
    options = dict(seq_len=GENERATED, min_seq_len=1, sot_token_id=int(ids[0, 0]), eos_token_id=int(ids[0, -1]), fixed_output_length=True)
    greedy = model.generate(image, generation_type="top_k", top_k=1, **options)
    beam = model.generate(image, generation_type="beam_search", num_beams=3, num_beam_groups=1, **options)
    return dict(greedy=greedy, beam=beam, image_embed=out["image_features"], text_embed=out["text_features"], logit_scale=out["logit_scale"].reshape(()), logits=out["logits"])


def clip(name, release="open_clip", vision=(), text=(), lengths=(12, 3, 7), seed=0, script=False, hints=(), **model):
    """A case of CLIP's layout: (files written by ``write(folder)``, inputs, answers)."""
    vision, words = {**VISION, **dict(vision)}, {**TEXT, **dict(text)}
    if isinstance(vision["layers"], tuple):
        vision.pop("patch_size"), vision.pop("head_width")
    kind = open_clip.model.CustomTextCLIP if model.pop("custom_text", False) else open_clip.model.CLIP
    net = draw(kind(embed_dim=24, vision_cfg=vision, text_cfg=words, **model), seed)
    eos = words.get("eos_id", words["vocab_size"] - 1)
    image, ids = inputs(vision["image_size"], words["context_length"], words["vocab_size"], eos, seed, lengths)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=words, **model)

    def write(folder):
        if release == "openai_clip":
            state = {**net.state_dict(), "input_resolution": torch.tensor(vision["image_size"]), "context_length": torch.tensor(words["context_length"]),
                     "vocab_size": torch.tensor(words["vocab_size"])}
            if script:
                write_script(net, image, ids, folder / "model.pt")
            else:
                torch.save(half(state), folder / "model.pt")
        else:
            (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg={}), indent=1))
            torch.save({"epoch": 3, "name": name, "state_dict": {f"module.{k}": v for k, v in half(net.state_dict()).items()}},
                       folder / "open_clip_pytorch_model.bin")

    return dict(name=name, release=release, net=net, image=image, ids=ids, write=write, answers=lambda: clip_answers(net, image, ids), hints=dict(hints))


def half(state):
    """OpenAI's archives hold norms and tables in fp32, the rest in fp16."""
    return {k: v.half() if v.is_floating_point() and v.ndim > 1 and "embedding" not in k else v for k, v in state.items()}


def write_script(net, image, ids, path):
    """As OpenAI's archives: a traced module, weights in fp16."""
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in net.named_children():
                self.add_module(name, child)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(net, name))
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(7))

        def forward(self, image, ids):
            x = self.visual(image)
            y = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))
            return x, y.mean(1) @ self.text_projection * self.logit_scale

    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Both(), (image, ids), check_trace=False), str(path))


def hf(name, vision=(), text=(), lengths=(12, 3, 7), seed=0, activation="quick_gelu", eos=2):
    from transformers import CLIPConfig, CLIPModel
    vocab = 60
    shared = dict(hidden_act=activation, projection_dim=24)
    config = CLIPConfig(projection_dim=24,
                        vision_config=dict(shared, image_size=24, patch_size=6, hidden_size=24, intermediate_size=50, num_hidden_layers=2,
                                           num_attention_heads=3, **dict(vision)),
                        text_config=dict(shared, vocab_size=vocab, max_position_embeddings=12, hidden_size=16, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, eos_token_id=eos, bos_token_id=vocab - 2, pad_token_id=1, **dict(text)))
    net = draw(CLIPModel(config), seed)
    end = vocab - 1 if eos == 2 else eos
    image, ids = inputs(24, 12, vocab, end, seed, lengths, pad=end)

    def answers():
        vision_out, text_out = net.vision_model(pixel_values=image), net.text_model(input_ids=ids)
        return dict(image_embed=F.normalize(net.visual_projection(vision_out.pooler_output), dim=-1),
                    text_embed=F.normalize(net.text_projection(text_out.pooler_output), dim=-1),
                    logit_scale=net.logit_scale.exp(), image=vision_out.last_hidden_state)

    return dict(name=name, release="hf_clip", net=net, image=image, ids=ids, write=lambda folder: net.save_pretrained(folder), answers=answers)


def coca(name, embed=16, vision=(), text=(), multimodal=(), lengths=(11, 3, 7), length=11, seed=0, **model):
    vision = {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 9, "output_tokens": True, **dict(vision)}
    words = {**TEXT, "context_length": length, "embed_cls": True, "output_tokens": True, **dict(text)}
    multi = dict(context_length=length, vocab_size=words["vocab_size"], width=embed, heads=2, layers=2, **dict(multimodal))
    config = dict(embed_dim=embed, vision_cfg=vision, text_cfg=words, multimodal_cfg=multi, custom_text=True, **model)
    built = {k: v for k, v in config.items() if k not in ("custom_text", "embed_dim")}
    net = open_clip.coca_model.CoCa(embed_dim=embed, **built)
    net = draw(net, seed)
    image, ids = inputs(vision["image_size"], length, words["vocab_size"], words["vocab_size"] - 1, seed, lengths)

    def write(folder):
        (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg={}), indent=1))
        torch.save(half(net.state_dict()), folder / "open_clip_pytorch_model.bin")

    return dict(name=name, release="open_clip_coca", net=net, image=image, ids=ids, write=write, answers=lambda: coca_answers(net, image, ids))


CASES = (
    lambda: clip("openai_vit", "openai_clip", quick_gelu=True, hints=dict(image_heads=3, text_heads=2)),
    lambda: clip("openai_vit_script", "openai_clip", vision=dict(width=64, head_width=64, layers=1), text=dict(width=64, heads=1, layers=1), quick_gelu=True,
                 seed=1, script=True),
    lambda: clip("openai_resnet", "openai_clip", vision=dict(image_size=64, width=4, layers=(1, 2, 1, 1)), text=dict(width=64, heads=1, layers=1),
                 quick_gelu=True, seed=2),
    lambda: clip("open_clip_odd", vision=dict(width=60, head_width=20, mlp_ratio=4.3637), text=dict(width=36, heads=3, layers=3), seed=3),
    lambda: clip("open_clip_quickgelu", quick_gelu=True, seed=4),
    lambda: clip("open_clip_custom_text", vision=dict(patch_size=8), custom_text=True, seed=5),
    lambda: clip("open_clip_clipa", vision=dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
                 text=dict(pool_type="last", no_causal_mask=True), seed=6),
    lambda: clip("open_clip_avg_eps", vision=dict(pool_type="avg", norm_kwargs=dict(eps=1e-3)), text=dict(norm_kwargs=dict(eps=1e-3)), seed=7),
    lambda: clip("open_clip_eos_bias", text=dict(pool_type="eos", eos_id=3), custom_text=True, init_logit_bias=-10.0, seed=8),
    lambda: clip("open_clip_resnet", vision=dict(image_size=64, width=4, layers=(1, 1, 2, 1)), nonscalar_logit_scale=True, seed=9),
    lambda: hf("hf_old_end", seed=10),
    lambda: hf("hf_new_end", vision=dict(layer_norm_eps=1e-3), text=dict(layer_norm_eps=1e-2), activation="gelu", eos=57, seed=11),
    lambda: coca("coca", seed=12),
    lambda: coca("coca_equal_width", embed=24, text=dict(width=24, heads=3), vision=dict(mlp_ratio=2.0), quick_gelu=True, lengths=(40, 3, 7), length=40, seed=13),
)


def train_step(case):
    """One step of AdamW on open_clip's own loss: {"loss", "grad/NAME", "after/NAME"}."""
    net = case["net"]
    if case["release"] == "open_clip_coca":
        loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)(**net(case["image"], case["ids"]), output_dict=False)
        loss = sum(loss)
    else:
        image, text = net.encode_image(case["image"], normalize=True), net.encode_text(case["ids"], normalize=True)
        loss = open_clip.ClipLoss()(image, text, net.logit_scale.exp())
    named = dict(net.named_parameters())
    plain = {n for n, p in named.items() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n}     # open_clip_train main.py
    optimizer = torch.optim.AdamW([{"params": [p for n, p in named.items() if n in plain], "weight_decay": 0.0},
                                   {"params": [p for n, p in named.items() if n not in plain], "weight_decay": STEP["weight_decay"]}],
                                  lr=STEP["lr"], betas=(STEP["b1"], STEP["b2"]), eps=STEP["eps"])
    loss.backward()
    out = {"loss": loss.detach().numpy(), **{f"grad/{n}": p.grad.numpy().copy() for n, p in named.items()}}
    optimizer.step()
    return {**out, **{f"after/{n}": p.detach().numpy().copy() for n, p in named.items()}}


STEP = dict(lr=1e-2, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
STEPPED = ("open_clip_quickgelu", "coca")


def write_case(case, folder: pathlib.Path):
    """Files; io.npz: image [b, h, w, 3], text [b, l], and the answers by name; for some, step.npz: one training step."""
    folder.mkdir(parents=True, exist_ok=True)
    case["write"](folder)
    with torch.no_grad():
        answers = {k: v.detach().numpy() for k, v in case["answers"]().items()}
    np.savez_compressed(folder / "io.npz", image_input=case["image"].numpy().transpose(0, 2, 3, 1), text_input=case["ids"].numpy().astype(np.int32), **answers)
    if case["name"] in STEPPED:
        np.savez_compressed(folder / "step.npz", **train_step(case))
    (folder / "case.json").write_text(json.dumps(dict(release=case["release"], hints=case.get("hints", {}), torch=torch.__version__,
                                                      open_clip=open_clip.__version__, step=STEP)))
