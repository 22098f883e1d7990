"""CLIP: contrastive language-image pre-training (arXiv 2103.00020).

python -m vlm_jax.main --config=configs/clip.py
    The embedded preset: small towers on procedural scenes, a few minutes on 2 CPU cores.
python -m vlm_jax.main --config=configs/clip.py:b32 --config.stages.pretrain.data.train='tars:/data/{00000..41455}.tar' \\
    --config.stages.pretrain.data.eval=tars:/data/val.tar
    A published size (b32 b16 l14 l14_336 rn50 rn101 rn50x4 rn50x16 rn50x64, open_clip's h14 g14 bigg14), with its recipe.
python -m vlm_jax.main --config=configs/clip.py:small --config.stages.pretrain.data.train='tars:/data/emoji/{00..03}.tar' ...
    64-pixel images, 14M parameters: for small collections; see docs/results.md.
text=cbow trains the bag-of-words text encoder instead of the transformer.
python -m vlm_jax.main --config=configs/clip.py:b32,tune=lora --stage=finetune --config.stages.finetune.init=DIR_OR_HF \\
    --config.stages.finetune.data.train=folder:/photos
    Goes on from trained or imported weights (tune=full|head|lora; the size sets the rates); task=classes for class folders.
"""

from vlm_jax import config as c

# Tables 19 and 20 of the paper (h14, g14, bigg14: open_clip's model configs):
# image tower, its variant, pixels, text variant, embedding width, peak learning rate
SIZES = {
    "b32": ("vit", "b32", 224, "512x12", 512, 5e-4),
    "b16": ("vit", "b16", 224, "512x12", 512, 5e-4),
    "l14": ("vit", "l14", 224, "768x12", 768, 4e-4),
    "l14_336": ("vit", "l14_336", 336, "768x12", 768, 2e-5),
    "rn50": ("resnet", "rn50", 224, "512x12", 1024, 5e-4),
    "rn101": ("resnet", "rn101", 224, "512x12", 512, 5e-4),
    "rn50x4": ("resnet", "rn50x4", 288, "640x12", 640, 5e-4),
    "rn50x16": ("resnet", "rn50x16", 384, "768x12", 768, 4e-4),
    "rn50x64": ("resnet", "rn50x64", 448, "1024x12", 1024, 3.6e-4),
    "h14": ("vit", "h14", 224, "1024x24", 1024, 5e-4),
    "g14": ("vit", "g14", 224, "1024x24", 1024, 5e-4),
    "bigg14": ("vit", "bigg14", 224, "1280x32", 1280, 5e-4),
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_SCALE = 4.605170185988092   # ln 100


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", "small", *SIZES), res=0, text=("transformer", "cbow"), tune=c.TUNES, task=("captions", "classes"))
    if args.size == "scenes":
        pretrain = scenes(args.res or 48, args.text)
    elif args.size == "small":
        pretrain = small(args.res or 64, args.text)
    else:
        pretrain = published(args.size, args.res, args.text)
    return c.stages(("pretrain",), pretrain=pretrain, finetune=finetune(args.size, args.tune, args.task))


def finetune(size, tune, task):
    """Own pairs or class folders."""
    return c.finetune(
        "clip", size=size, tune=tune, task=task, heads="(image_head|image_pooler|image/pool|text_head|logit_scale)(/.*)?",
        clamps=(("logit_scale", 0.0, MAX_SCALE),), evals=dict(retrieval=dict(kind="retrieval", data="", examples=2000, every="1epoch")),
        loss=dict(weights=dict(con=1.0), kind="softmax", directions="mean", duplicates="positives"))


def text_tower(kind, variant, **fields):
    return dict(tower="cbow", variant=variant) if kind == "cbow" else dict(tower="transformer", variant=variant, **fields)


def scenes(res, text):
    few = dict(qk_norm="rms", init_scheme="fan_in", positions="sincos")
    return c.stage(
        system="clip",
        model=dict(image=dict(few, tower="vit", variant="mini", stem="conv", class_token=False, norms_at=("output",),
                              positions_at=("input", "output")),
                   text=text_tower(text, "mini", end="eos", layers=2, **few), embed=128, image_pool="attention",
                   norm="rmsnorm", scale=10.0, dtype="auto", tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1)),
        loss=dict(weights=dict(con=1.0), kind="softmax", directions="mean", duplicates="negatives"),
        optim=dict(name="muon", lr=3e-3, muon_lr=0.08, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01,
                   muon_exclude=(".*/table", ".*_pooler/query"),     # the stem's matrices are Muon's too
                   schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="scenes:train", eval="scenes:test", batch=64, microbatch=0, size=res, length=32, tokenizer="scenes",
                  augment="squash", eval_augment="squash", threads=1, prefetch=8, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")),   # free wording
                   zeroshot=dict(kind="zeroshot", data="scenes:objects", examples=420, options=dict(templates="scene"))),
        steps=1000, checkpoint=dict(every=500, keep=2))


def small(res, text):
    """Six layers of width 192 over a convolutional stem, and four for the text: 14.4M parameters with CLIP's token table
    (9.5M of them), 5.3M with a tokenizer of 2,000 pieces."""
    few = dict(width=192, heads=3, mlp_dim=768)
    return c.stage(
        system="clip",
        model=dict(image=dict(few, tower="vit", variant="b16", stem="conv", patch=8, layers=6, patch_dropout=0.5, remat="dots"),
                   text=text_tower(text, "512x12", layers=4, end="eos", remat="dots", **few), embed=128, image_pool="class",
                   norm="layernorm", mean=CLIP_MEAN, std=CLIP_STD, scale=1 / 0.07, dtype="auto",
                   tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1)),
        loss=dict(weights=dict(con=1.0), kind="softmax", directions="mean", duplicates="positives"),
        optim=dict(name="muon", lr=2e-3, muon_lr=0.05, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.1,
                   muon_exclude=(".*/table", ".*/position_embed"), schedule="cosine", warmup="5%", clip_norm=1.0,
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=252, microbatch=0, size=res, length=32, tokenizer="train:2000",
                  augment="random_resized_crop(scale=0.6..1)|color_jitter(hue=0.05)|grayscale(p=0.1)", eval_augment="resize|center_crop",
                  buckets=(16, 20, 24), threads=2, prefetch=4, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", every=0)),
        steps=620, checkpoint=dict(every=200, keep=2))


def published(size, res, text):
    """Tables 18-20: batch 32,768, 32 epochs of 400M pairs (12.8B samples), Adam with decoupled decay 0.2 off gains
    and biases, 2,000 steps of warm-up, cosine to 0, scale at most 100; random square crops of the resized image."""
    tower, variant, pixels, words, embed, lr = SIZES[size]
    openai = size not in ("h14", "g14", "bigg14")
    activation = dict(activation="quick_gelu") if openai else {}
    image = dict(tower=tower, variant=variant, **({} if tower == "resnet" else dict(activation, remat="full")))
    adam = dict(b2=0.999, eps=1e-8) if tower == "resnet" else dict(b2=0.98, eps=1e-6)
    fine = size == "l14_336"    # one more epoch at 336 pixels, from L/14
    return c.stage(
        system="clip",
        model=dict(image=image, text=text_tower(text, words, end="largest", remat="full", **activation), embed=embed,
                   image_pool="class", norm="layernorm", mean=CLIP_MEAN, std=CLIP_STD, scale=1 / 0.07, dtype="auto",
                   tokens=dict(vocab=49408, bos=49406, eos=49407, pad=0)),
        loss=dict(weights=dict(con=1.0), kind="softmax", directions="mean", duplicates="negatives"),
        optim=dict(name="adamw", lr=lr, b1=0.9, **adam, weight_decay=0.2, schedule="cosine", warmup=2000,
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=32768, microbatch=0, size=res or pixels, length=77, tokenizer="clip",
                  augment="resize|random_crop", eval_augment="resize|center_crop",
                  threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", every=0)),
        steps=12_208 if fine else 390_625, checkpoint=dict(every=2000, keep=3), rules="fsdp")
