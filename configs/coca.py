"""CoCa: contrastive captioners (arXiv 2205.01917).

python -m vlm_jax.main --config=configs/coca.py
    The embedded preset: 0.8M parameters on procedural scenes, some five minutes on 2 CPU cores.
    What it reaches is in docs/results.md.
python -m vlm_jax.main --config=configs/coca.py:base --config.stages.pretrain.data.train='tars:gs://bucket/{00000..41455}.tar' \\
    --config.stages.pretrain.data.eval=tars:... --config.stages.pretrain.data.tokenizer=sentencepiece:/path/64k.model
    A size of the paper (base, large, 2b) or of open_clip (b32_open, l14_open) on your own pairs; ``small`` for few of them.
python -m vlm_jax.main --config=configs/coca.py:l14_open,tune=lora --stage=finetune --config.stages.finetune.init=DIR_OR_HF \\
    --config.stages.finetune.data.train=folder:/photos
    Goes on from trained or imported weights (tune=full|head|lora; the size sets the rates), for captions or retrieval; task=classes for class folders.
"""

from vlm_jax import config as c

# Table 1; the paper does not state pooler heads, norms and context: open_clip's pooler layer, heads of the
# model, context 64. Two sums over the batch and one sum over tokens there; here means, so that 2:1 is
# open_clip's scaling of the paper's weights.
PAPER = {"base": ("coca_base", "768x12", 12, 512), "large": ("coca_large", "1024x12", 16, 512),
         "2b": ("coca_giant", "1408x18", 16, 1024)}
# open_clip model_configs/coca_ViT-B-32.json, coca_ViT-L-14.json
OPEN = {"b32_open": ("b32", "512x12", 512), "l14_open": ("l14", "768x12", 768)}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_SCALE = 4.605170185988092   # ln 100


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", "small", *PAPER, *OPEN), res=0, tune=c.TUNES, task=("captions", "classes"))
    if args.size == "scenes":
        pretrain = scenes(args.res or 48)
    elif args.size == "small":
        pretrain = small(args.res or 64)
    elif args.size in PAPER:
        pretrain = paper(args.size, args.res or 288)
    else:
        pretrain = open_clip(args.size, args.res or 224)
    return c.stages(("pretrain",), pretrain=pretrain, finetune=finetune(args.size, args.tune, args.task))


def finetune(size, tune, task):
    """Section 4.2: captioning and retrieval go on with the losses of pre-training at a small rate. Class folders train by
    their prompts."""
    return c.finetune(
        "coca", size=size, tune=tune, task=task, heads="(image_head|text_head|\\w*pooler|logit_scale)(/.*)?",
        clamps=(("logit_scale", 0.0, MAX_SCALE),),
        evals=dict(retrieval=dict(kind="retrieval", data="", examples=1000, every="1epoch"), caption=dict(kind="caption", data="", examples=500, every=0)),
        loss=dict(weights=dict(con=1.0, cap=2.0), directions="mean", duplicates="positives"))


def evals(source):
    return dict(retrieval=dict(kind="retrieval", data=source, examples=1000),
                caption=dict(kind="caption", data=source, examples=500))


def scenes(res):
    small = dict(variant="mini", qk_norm="rms", init_scheme="fan_in")
    return c.stage(
        system="coca",
        model=dict(image=dict(small, stem="conv", class_token=False, positions="sincos", norms_at=("output",),
                              positions_at=("input", "output")),
                   text=dict(small, positions="sincos", class_mask="exact"),
                   decoder=dict(small),
                   poolers=dict(layout="parallel", queries=32, heads=3, qk_norm="rms", init_scheme="fan_in"),
                   embed=128, norm="rmsnorm", scale=10.0, dtype="auto", tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1)),
        loss=dict(weights=dict(con=1.0, cap=2.0), directions="mean", duplicates="negatives"),
        optim=dict(name="muon", lr=3e-3, muon_lr=0.08, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01,
                   muon_exclude=(".*/table", ".*/vocab_kernel", ".*_pooler/query"),     # the stem's matrices are Muon's too
                   schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="scenes:train", eval="scenes:test", batch=56, microbatch=0, size=res, length=32, tokenizer="scenes",
                  augment="squash", eval_augment="squash", threads=1, prefetch=8, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")),   # free wording
                   retrieval_pair=dict(kind="retrieval", data="scenes:heldout_pair", examples=1000, options=dict(captions="first")),
                   caption=dict(kind="caption", examples=500),
                   caption_triple=dict(kind="caption", data="scenes:heldout_triple", examples=500),
                   caption_pair=dict(kind="caption", data="scenes:heldout_pair", examples=500),
                   zeroshot=dict(kind="zeroshot", data="scenes:objects", examples=420, options=dict(templates="scene"))),
        steps=1140, checkpoint=dict(every=500, keep=2))


def small(res):
    """The embedded preset a little larger, for a few thousand captioned pictures of one's own, with a tokenizer trained on their captions."""
    stage = scenes(res)
    few = dict(width=128, heads=4, layers=3, mlp_dim=384)
    for tower in ("image", "text", "decoder"):
        stage["model"][tower].update(few)
    stage["model"]["poolers"]["heads"] = 4
    stage["model"].update(mean=CLIP_MEAN, std=CLIP_STD)
    stage["data"].update(train="", eval="", batch=64, tokenizer="train:2000", length=40, augment="random_resized_crop(scale=0.6..1)|color_jitter(hue=0.05)",
                         eval_augment="resize|center_crop", threads=2)
    stage["loss"]["duplicates"] = "positives"
    stage["optim"]["muon_lr"] = 0.05
    stage["evals"] = evals("")
    return stage


def paper(size, res):
    """Section 4.1 and appendix B: Adafactor b1 .9, b2 .999, decoupled decay .01, batch 65,536, 500k steps,
    2% warm-up to 8e-4 and linear decay, images of 288 pixels."""
    image, text, heads, embed = PAPER[size]
    return c.stage(
        system="coca",
        model=dict(image=dict(variant=image, class_token=False, norms_at=("output",), remat="full"),
                   text=dict(variant=text, class_mask="exact", remat="full"), decoder=dict(variant=text, layout="single", remat="full"),
                   poolers=dict(layout="cascade", queries=256, heads=heads, use_bias=False),
                   embed=embed, norm="layernorm", scale=1 / 0.07, dtype="auto", tokens=dict(vocab=64000, bos=-1, eos=-1, pad=-1)),
        loss=dict(weights=dict(con=1.0, cap=2.0), directions="mean", duplicates="negatives"),
        optim=dict(name="adafactor", lr=8e-4, momentum=0.9, b2_cap=0.999, weight_decay=0.01, schedule="linear", warmup="2%",
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=65536, microbatch=0, size=res, length=64, tokenizer="", augment="random_resized_crop",
                  eval_augment="resize|center_crop", threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01),
        evals=evals(""), steps=500_000, checkpoint=dict(every=2000, keep=3), rules="fsdp")


def open_clip(size, res):
    """open_clip's towers and CLIP's preprocessing; names of the released runs imply 13B samples at batch 90k."""
    image, text, embed = OPEN[size]
    return c.stage(
        system="coca",
        model=dict(image=dict(variant=image), text=dict(variant=text, class_mask="shifted"), decoder=dict(variant=text, layout="double"),
                   poolers=dict(layout="open_clip", queries=256, heads=8), embed=embed, norm="layernorm", mean=CLIP_MEAN, std=CLIP_STD,
                   scale=1 / 0.07, dtype="auto", tokens=dict(vocab=49408, bos=49406, eos=49407, pad=0)),
        loss=dict(weights=dict(con=1.0, cap=2.0), directions="mean", duplicates="negatives"),
        optim=dict(name="adamw", lr=5e-4, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2, schedule="cosine", warmup=10_000,
                   clamps=(("logit_scale", 0.0, MAX_SCALE),), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=90_112, microbatch=0, size=res, length=76, tokenizer="clip",
                  augment="random_resized_crop(scale=0.9..1)", eval_augment="resize|center_crop", threads=16, prefetch=4,
                  block=64, window=1024, bad_budget=0.01),
        evals=evals(""), steps=144_000, checkpoint=dict(every=2000, keep=3), rules="fsdp")
