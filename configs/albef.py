"""ALBEF: align before fuse, with momentum distillation (arXiv 2107.07651).

python -m vlm_jax.main --config=configs/albef.py
    The embedded preset: small towers on procedural scenes, under nine minutes on 2 CPU cores that it shared with another training. Among 1,000 unseen scenes R@1 is .455 text to image and
    .447 image to text, R@10 .999 and .997; of a true caption and one of the same words the matching head prefers the true one in .621.
python -m vlm_jax.main --config=configs/albef.py:base --config.stages.pretrain.data.train='tars:/data/{0000..0999}.tar' \\
    --config.stages.pretrain.data.tokenizer=bert:vocab.txt
    The paper's size and recipe. ":base,vit=DIR,bert=DIR" starts from DeiT and BERT as the paper does (importers, releases timm_vit and
    hf_bert); --config.stages.pretrain.init=DIR from ALBEF.pth (release albef).
python -m vlm_jax.main --config=configs/albef.py:base --stage=retrieval --config.stages.retrieval.init=DIR --config.stages.retrieval.data.train=...
    Image-text retrieval at 384 pixels, targets aware of images.
python -m vlm_jax.main --config=configs/albef.py:base --stage=vqa --config.stages.vqa.init=DIR --config.stages.vqa.data.train=jsonl:vqa_train.json ...
    Questions (vqa), visual entailment (entailment), two images (nlvr, after an epoch of --stage=assign on pairs of the pre-training). Annotation
    files as published, beside their images. DIR: a run's pretrain stage, or an imported ALBEF.pth.
"""

import functools

from vlm_jax import config as c

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPERATURE = ("temp", 0.001, 0.5)
# salesforce/ALBEF dataset/randaugment.py: two of these with strength 7
AUGMENT = "random_resized_crop(scale={}..1)|flip|rand_augment(n=2, m=7)"
# Section 3.1: BERT's first layers read, its last ones fuse; their cross-attention starts fresh
FROM_BERT = (("text/blocks/(.*)", r"text/blocks/\1[0/2]", "copy"), ("text/blocks_cross/((attn|norm1|mlp|norm2)/.*)", r"text/blocks/\1[1/2]", "copy"),
             ("text/(token_embed/table|.*_embed|embed_norm/.*)|lm_head/.*", "", "copy"))


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", "base"), res=0, vit="", bert="")
    init = c.from_towers(args.vit, args.bert, FROM_BERT)
    if args.size == "scenes":
        pretrain = scenes(args.res or 48)
        return c.stages(("pretrain",), pretrain=dict(pretrain, init=init), retrieval=scenes_retrieval(), **tasks(pretrain, scenes_task))
    return c.stages(("pretrain",), pretrain=dict(base(args.res or 256), init=init), retrieval=base_retrieval(args.res or 384),
                    **tasks(base(256), functools.partial(base_task, args.res or 384)))


def scenes(res):
    return c.stage(
        system="albef",
        model=dict(image=dict(variant="mini", stem="conv", norms_at=("output",), positions="sincos", positions_at=("input", "output"), qk_norm="rms",
                              init_scheme="fan_in"),
                   text=dict(variant="mini", positions=48, cross_layers=2), embed=64, temp=0.07, dtype="auto",
                   tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1, mask=-1)),
        # so few steps leave a long queue stale, a slow teacher behind, and a word in seven masked in short captions says little
        loss=dict(weights=dict(itc=1.0, itm=1.0, mlm=1.0), momentum=0.95, queue=128, alpha=0.4, alpha_ramp=200, mask_share=0.4),
        optim=dict(name="muon", lr=2e-3, muon_lr=0.03, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01,
                   muon_exclude=(".*/table", ".*/position_embed", ".*/type_embed"), schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   groups=(("temp", dict(lr=0.02)),),      # it is no logarithm: a rate for weights would take it to 0
                   clamps=(TEMPERATURE,), ema=0.0, max_bad_steps=10),
        data=dict(train="scenes:train", eval="scenes:test", batch=32, microbatch=0, size=res, length=32, tokenizer="scenes",
                  augment="squash", eval_augment="squash", threads=1, prefetch=8, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")),
                   rerank=dict(kind="rerank", examples=500, options=dict(captions="first", k=16)), matching=dict(kind="matching", examples=500),
                   grounding=dict(kind="grounding", examples=500)),
        steps=1500, checkpoint=dict(every=500, keep=2))


def scenes_retrieval():
    return c.stage(**{**scenes(48), **dict(
        model="init", init="@pretrain", loss=dict(weights=dict(itc=1.0, itm=1.0), momentum=0.95, queue=128, alpha=0.4, targets="images"),
        optim=dict(scenes(48)["optim"], lr=5e-4, muon_lr=0.01), steps=300)})


def base(res):
    """Section 3.5 and configs/Pretrain.yaml: batch 512 (64 on each of 8 GPUs, which mine among themselves: group), 30 epochs of 4.0M images,
    AdamW with decay .02 off biases and 1-D leaves (tables and the 0-D temperature do decay), 1e-4 after a warm-up of 2,000
    steps, cosine to 1e-5."""
    return c.stage(
        system="albef",
        model=dict(image=dict(variant="timm_b16", remat="full"), text=dict(variant="base", cross_layers=6, dropout=0.1, remat="full"), embed=256, temp=0.07,
                   mean=CLIP_MEAN, std=CLIP_STD, dtype="auto", tokens=dict(vocab=30522, bos=101, eos=102, pad=0, mask=103)),
        loss=dict(weights=dict(itc=1.0, itm=1.0, mlm=1.0), momentum=0.995, queue=65536, alpha=0.4, alpha_ramp=7_800, group=64, mask_share=0.15),
        optim=dict(name="adamw", lr=1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.02, decay_exclude=(r"(.*/)?(bias|scale)", ".*class_embed"), schedule="cosine", warmup=2000, end_lr=1e-5,
                   clamps=(TEMPERATURE,), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=512, microbatch=0, size=res, length=25, tokenizer="bert", text_clean="albef", augment=AUGMENT.format(0.2), eval_augment="squash",
                  threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", every=0)), steps=234_000, checkpoint=dict(every=2000, keep=3))


def base_retrieval(res):
    """configs/Retrieval_coco.yaml: 384 pixels, batch 256 (32 a GPU), 5 epochs, 1e-5 to 1e-6; texts of one image are positives."""
    pretrain = base(256)
    return c.stage(**{**pretrain, **dict(
        init="@pretrain", loss=dict(weights=dict(itc=1.0, itm=1.0), momentum=0.995, queue=65536, alpha=0.4, alpha_ramp=2_200, targets="images", group=32),
        optim=dict(pretrain["optim"], lr=1e-5, end_lr=1e-6, warmup=100),
        data=dict(pretrain["data"], batch=256, size=res, length=30, augment=AUGMENT.format(0.5)), steps="5epochs")})


# ---- section 4: what pre-training is for

PAPER = "2107.07651"
ENTAILMENT, STATEMENT = ("contradiction", "neutral", "entailment"), ("False", "True")


def tasks(start, task):
    """The answer decoder starts from the layers that fuse; for two images each of these becomes two. ``task`` makes a stage of the preset's size."""
    model = {k: v for k, v in start["model"].items() if k not in ("embed", "temp")} | dict(paper=PAPER)
    text = model["text"]
    decoder = {k: v for k, v in text.items() if k != "cross_layers"} | dict(layers=text["cross_layers"])
    pairs = dict(model, text=dict(text, pairing="alternate"))
    return dict(
        vqa=task("vqa", system="bert_vqa", model=dict(model, decoder=decoder, answer_ends=2), data=dict(answers=10, answer_length=8),
                 loss=dict(weights=dict(answer=1.0), alpha=0.4, rank_by="first_and_sequence")),
        entailment=task("entailment", system="bert_classify", model=dict(model, classes=3), data=dict(classes=ENTAILMENT), loss=dict(weights=dict(cls=1.0), alpha=0.4)),
        assign=task("assign", system="bert_classify", model=dict(pairs, classes=3, head="linear", embed=start["model"]["embed"]),
                    loss=dict(weights=dict(cls=1.0), targets="assignment")),
        nlvr=task("nlvr", system="bert_classify", model=dict(pairs, classes=2), data=dict(classes=STATEMENT, images=2), loss=dict(weights=dict(cls=1.0), alpha=0.4),
                  init=(("head/.*", "fresh", "copy"), "@assign")))


def scenes_task(name, data=(), loss=(), **sections):
    start, of = scenes(48), {"vqa": "/vqa", "entailment": "/entailment", "nlvr": "/pairs", "assign": ""}[name]
    scored = dict(vqa=dict(vqa=dict(kind="vqa", examples=500, options=dict(k=16))), assign={}).get(name, dict(classify=dict(kind="classify", examples=1000)))
    return c.stage(**{**start, **dict(
        init="@pretrain", loss=dict(loss, **(dict(alpha_ramp=100) if "alpha" in loss else {})), evals=scored, steps=300,
        data=dict(start["data"], train=f"scenes:train{of}", eval=f"scenes:test{of}", **dict(data)),
        optim=dict(start["optim"], lr=5e-4, muon_lr=0.01, groups=(), clamps=())), **sections})


def base_task(res, name, data=(), loss=(), **sections):
    """configs/{VQA,VE,NLVR_pretrain,NLVR}.yaml: epochs, batch of 8 GPUs, warm-up, steps of an epoch (in the first one distillation comes in; not for entailment)."""
    epochs, batch, warmup, ramp = {"vqa": (8, 256, 400, 2_570), "entailment": (5, 256, 100, 0), "assign": (1, 512, 100, 0), "nlvr": (10, 128, 100, 675)}[name]
    start, question = base(256), name == "vqa"
    scored = dict(vqa=dict(vqa=dict(kind="vqa", every=0)), assign={}).get(name, dict(classify=dict(kind="classify", every="1epoch")))
    return c.stage(**{**start, **dict(
        init="@pretrain", loss=dict(loss, **(dict(alpha_ramp=ramp) if "alpha" in loss else {})), evals=scored, steps=f"{epochs}epochs",
        optim=dict(start["optim"], lr=2e-5, end_lr=1e-5 if name == "assign" else 1e-6, warmup=warmup, every="1epoch", clamps=()),
        data=dict(start["data"], batch=batch, size=256 if name == "assign" else res, length=25 if question or name == "assign" else 30,
                  text_clean="albef_question" if question else "albef", augment=AUGMENT.format(0.2 if name == "assign" else 0.5),
                  **(dict(answer="json:answer@0.5") if question else {}), **dict(data))), **sections})
