"""VQ-KD: the image tokenizer of BEiT v2 and BEiT-3 (arXiv 2208.06366).

python -m vlm_jax.main --config=configs/vqkd.py
    The embedded preset: a small CLIP of procedural scenes (teacher), then the tokenizer that learns to say its features in codes; a few minutes
    on 2 CPU cores. Decoded features reach a cosine of 0.73 to the teacher's (the best constant feature 0.09), with 33 of the 256 codes in use and a
    perplexity of 18: most patches are background, and codes that k-means left behind in the first step are not revived, as published.
python -m vlm_jax.main --config=configs/vqkd.py:base --config.stages.tokenizer.init=CLIP_DIR \\
    --config.stages.tokenizer.data.train='tars:/data/imagenet/{0000..1023}.tar' --config.stages.tokenizer.data.eval=tars:/data/imagenet/val.tar
    The paper's tokenizer; CLIP_DIR: ViT-B/16 imported with --release=openai_clip, or any other CLIP with a ViT of patch 16, trained or imported.
    ":base,layers=3" has three layers in the decoder. Annotations are not read. Teachers like DINO are out of scope.
python -m vlm_jax.importers.cli --release=vqkd --src=vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth --out=DIR
python -c "import sys, vlm_jax; m = vlm_jax.load(sys.argv[1]); print(m.predict['tokens']({'image': m.images(sys.argv[2])})['ids'][0])" DIR IMAGE
    Published weights. With ILSVRC2012_val_00031649.JPEG (in beit2/demo of microsoft/unilm) as IMAGE the ids begin 3812, 7466, 1913, 1913, 1903, ...
    The weights cannot be had where this was written: that statement has not been seen to hold here.
"""

from vlm_jax import config as c

TEACHER = r"(?!teacher/).*"      # all but it trains
NO_DECAY = ("1d", ".*position_embed")


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", "base"), res=0, layers=0)
    if args.size == "scenes":
        return c.stages(("teacher", "tokenizer"), teacher=scenes_teacher(args.res or 48), tokenizer=scenes(args.res or 48, args.layers or 1))
    return c.stages(("tokenizer",), tokenizer=base(args.res or 224, args.layers or 1))


def scenes_teacher(res):
    """A CLIP whose patches go through the projection before they are averaged: each has a place in the joint space."""
    few = dict(variant="mini", qk_norm="rms", init_scheme="fan_in", positions="sincos")
    return c.stage(
        system="clip",
        model=dict(image=dict(few, tower="vit", stem="conv", class_token=False, norms_at=(), positions_at=("input",)),
                   text=dict(few, tower="transformer", end="eos", layers=2), embed=128, image_pool="normed_mean", norm="rmsnorm", scale=10.0, dtype="auto",
                   tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1)),
        loss=dict(weights=dict(con=1.0), kind="softmax", directions="mean", duplicates="negatives"),
        optim=dict(name="muon", lr=3e-3, muon_lr=0.08, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01, muon_exclude=(".*/table",),
                   schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   clamps=(("logit_scale", 0.0, 4.605170185988092),), ema=0.0, max_bad_steps=10),
        data=scenes_data(res), evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first"))),
        steps=600, checkpoint=dict(every=300, keep=1))


def scenes_data(res):
    return dict(train="scenes:train", eval="scenes:test", batch=64, microbatch=0, size=res, length=32, tokenizer="scenes", augment="squash",
                eval_augment="squash", threads=1, prefetch=8, bad_budget=0.01)


def scenes(res, layers):
    """256 codes of width 16 for the 36 patches of a 48-pixel scene."""
    tower = dict(variant="mini", patch_bias=True, key_bias=False, norms_at=("output",), eps=1e-6, init_scheme="beit")
    return c.stage(
        system="vqkd",
        model=dict(encoder=tower, decoder=dict(tower, layers=layers), codes=256, code_width=16, teacher="init", dtype="auto"),
        loss=dict(weights=dict(rec=1.0, commit=1.0), decay=0.99), trainable=(TEACHER,), init="@teacher",
        optim=dict(name="adamw", lr=2e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=1e-4, decay_exclude=NO_DECAY, schedule="cosine", warmup="10%", clip_norm=1.0,
                   ema=0.0, max_bad_steps=10),
        data=scenes_data(res), evals=dict(codebook=dict(kind="codebook", examples=1000)), steps=600, checkpoint=dict(every=300, keep=1))


def base(res, layers):
    """beit2/README.md and run_vqkd_training.py: 100 epochs of ImageNet-1k, batch 512 (64 on each of 8 GPUs), AdamW (.9, .99) with decay 1e-4, 5e-5 a 128
    images (2e-4) after 10 epochs of warm-up, cosine to 1e-5; crops of 8 to 100% of the image, bicubic, and flips."""
    return c.stage(
        system="vqkd",
        model=dict(encoder=dict(variant="beit_b16", remat="full"), decoder=dict(variant="beit_b16", layers=layers, remat="full"),
                   codes=8192, code_width=32, teacher="init", dtype="auto"),
        loss=dict(weights=dict(rec=1.0, commit=1.0), decay=0.99), trainable=(TEACHER,),
        optim=dict(name="adamw", lr=2e-4, b1=0.9, b2=0.99, eps=1e-8, weight_decay=1e-4, decay_exclude=NO_DECAY, schedule="cosine",
                   warmup="10epochs", start_lr=1e-6, end_lr=1e-5, ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=512, microbatch=0, size=res, length=1, tokenizer="scenes", augment="random_resized_crop(scale=0.08..1)|flip",
                  eval_augment=f"resize({res * 8 // 7 if res < 384 else res})|center_crop", threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01),
        evals=dict(codebook=dict(kind="codebook", every="10epochs")), steps="100epochs", checkpoint=dict(every="1epoch", keep=3))
