"""BLIP: bootstrapping language-image pre-training (arXiv 2201.12086).

python -m vlm_jax.main --config=configs/blip.py
    The embedded preset: small towers on procedural scenes, some twelve minutes on 2 CPU cores that it shared with another training. Among 1,000 unseen scenes R@1 is .309 text to image and
    .337 image to text, R@10 .966; captions reach CIDEr-D 2.77 (another image's caption .28), .02 of them right in every fact.
python -m vlm_jax.main --config=configs/blip.py:base --config.stages.pretrain.data.train='tars:/data/{0000..0999}.tar' \\
    --config.stages.pretrain.data.tokenizer=bert:vocab.txt
    A size of the paper (base, large) with its recipe. ":base,vit=DIR,bert=DIR" starts from DeiT and BERT as the paper does (importers,
    releases timm_vit and hf_bert).
python -m vlm_jax.main --config=configs/blip.py:base --stage=caption --config.stages.caption.init=DIR --config.stages.caption.data.train=... \\
    --config.stages.caption.data.tokenizer=bert:vocab.txt
    The captioner: the decoder alone, at 384 pixels, every caption behind "a picture of". DIR: a stage or an import (--release=blip) of the same size.
python -m vlm_jax.main --config=configs/blip.py:base --stage=retrieval --config.stages.retrieval.init=DIR --config.stages.retrieval.data.train=... \\
    --config.stages.retrieval.data.tokenizer=bert:vocab.txt
    Image-text retrieval at 384 pixels: the encoder alone, targets aware of images. It is also CapFilt's filter.
python -m vlm_jax.main --config=configs/blip.py:base --stage=vqa --config.stages.vqa.init=DIR --config.stages.vqa.data.train=jsonl:vqa_train.json ...
    Questions (vqa, at 480 pixels) and two images (nlvr). Annotation files as published, beside their images.
"""

import functools

from vlm_jax import config as c

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPERATURE = ("temp", 0.001, 0.5)
A_PICTURE_OF = (1037, 3861, 1997)     # ids of bert-base-uncased
# salesforce/BLIP transform/randaugment.py: two of these with strength 5
AUGMENT = "random_resized_crop(scale={}..1)|flip|rand_augment(n=2, m=5)"
# Section 4.1: image tower, batch on 32 GPUs, peak rate; rates of captioning and retrieval (appendix, table of fine-tuning settings)
SIZES = {"base": (dict(variant="timm_b16"), 2880, 3e-4, 1e-5, 1e-5), "large": (dict(variant="timm_l16", drop_path=0.1), 2400, 2e-4, 2e-6, 5e-6)}
IMAGES = 14_073_000     # COCO, Visual Genome, SBU, CC3M, CC12M
RERANK = dict(kind="rerank", options=dict(k=256, score="match+cosine"))     # configs/retrieval_coco.yaml
BEAMS = dict(method="beam", beams=3, max_length=20, min_length=5)     # configs/caption_coco.yaml
# Encoder and decoder start from the same layers, cross-attention fresh; rows of [DEC] and [ENC] are new
FROM_BERT = (("text/blocks_cross/((attn|norm1|mlp|norm2)/.*)", r"text/blocks/\1", "copy"),
             ("text/blocks_cross/decoder_((attn|norm1)/.*)", r"text/blocks/\1", "copy"), ("text/token_embed/table|lm_head/bias", "", "grow"),
             ("text/(position_embed|embed_norm/.*)|lm_head/.*", "", "copy"))


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", *SIZES), res=0, vit="", bert="")
    init = c.from_towers(args.vit, args.bert, FROM_BERT)
    if args.size == "scenes":
        pretrain = dict(scenes(args.res or 48), init=init)
        tuned = dict(pretrain, model="init", init="@pretrain", optim=dict(pretrain["optim"], lr=5e-4, muon_lr=0.01), steps=200)
        return c.stages(("pretrain",), pretrain=pretrain,
                        caption=dict(tuned, loss=dict(weights=dict(lm=1.0)), optim=dict(tuned["optim"], groups=(), clamps=()), evals=only(pretrain, "caption")),
                        retrieval=dict(tuned, loss=dict(weights=dict(itc=1.0, itm=1.0), queue=1024, targets="images", mined_by="student"),
                                       evals=only(pretrain, "retrieval", "rerank", "matching")), **tasks(pretrain, scenes_task))
    return c.stages(("pretrain",), pretrain=dict(pretrain_of(args.size, args.res or 224), init=init), caption=caption(args.size, args.res or 384),
                    retrieval=retrieval(args.size, args.res or 384), **tasks(pretrain_of(args.size, 224), functools.partial(task, args.size, args.res)))


def only(stage, *kinds):
    return {name: section for name, section in stage["evals"].items() if section["kind"] in kinds}


def scenes(res):
    return c.stage(
        system="blip",
        model=dict(image=dict(variant="mini", stem="conv", norms_at=("output",), qk_norm="rms", init_scheme="fan_in"),
                   text=dict(variant="mini", positions=48), embed=64, temp=0.07, dtype="auto", tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1, dec=-1, enc=-1)),
        loss=dict(weights=dict(itc=1.0, itm=1.0, lm=1.0), queue=1024, alpha=0.4, alpha_ramp=200, negative_epsilon=1e-4, label_smoothing=0.0),
        optim=dict(name="muon", lr=2e-3, muon_lr=0.03, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01,
                   muon_exclude=(".*/table", ".*/position_embed"), schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   groups=((TEMPERATURE[0], dict(lr=0.02)),),     # a temperature of 0.07 would be gone in 30 of Adam's steps
                   clamps=(TEMPERATURE,), ema=0.0, max_bad_steps=10),
        data=dict(train="scenes:train", eval="scenes:test", batch=56, microbatch=0, size=res, length=32, tokenizer="scenes",
                  augment="squash", eval_augment="squash", threads=1, prefetch=8, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")),
                   rerank=dict(RERANK, examples=500, options=dict(RERANK["options"], captions="first", k=16)),
                   matching=dict(kind="matching", examples=500), caption=dict(kind="caption", examples=500),
                   caption_pair=dict(kind="caption", data="scenes:heldout_pair", examples=500)),
        steps=1000, checkpoint=dict(every=500, keep=2))


def pretrain_of(size, res):
    """Section 4.1, configs/pretrain.yaml: 20 epochs of 14M images, AdamW with decay .05 on everything, 3,000 steps up from 1e-6, then 0.9 of the
    rate from epoch to epoch down to 1e-6 (the code's; the paper says 0.85). group: what each of 32 GPUs mined among itself. The
    distillation's share rises over two epochs."""
    image, batch, lr, _, _ = SIZES[size]
    return c.stage(
        system="blip",
        model=dict(image=dict(image, remat="full"), text=dict(variant="base", dropout=0.1, remat="full"), embed=256, temp=0.07, prompt=A_PICTURE_OF,
                   mean=CLIP_MEAN, std=CLIP_STD, dtype="auto", tokens=dict(vocab=30524, bos=101, eos=102, pad=0, dec=30522, enc=30523)),
        loss=dict(weights=dict(itc=1.0, itm=1.0, lm=1.0), momentum=0.995, queue=57600, alpha=0.4, alpha_ramp=2 * IMAGES // batch, negative_epsilon=1e-4,
                  group=batch // 32, label_smoothing=0.1),
        optim=dict(name="adamw", lr=lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, decay_exclude=(), schedule="exponential", decay_factor=0.9,
                   every="1epoch", warmup=3000, start_lr=1e-6, end_lr=1e-6, clamps=(TEMPERATURE,), ema=0.0, max_bad_steps=10),
        data=dict(train="", eval="", batch=batch, microbatch=0, size=res, length=30, tokenizer="", text_clean="blip", augment=AUGMENT.format(0.2), eval_augment="squash",
                  threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01),
        evals=dict(retrieval=dict(kind="retrieval", every=0), caption=dict(kind="caption", options=BEAMS, every=0)),
        steps="20epochs", checkpoint=dict(every=2000, keep=3), rules="fsdp")


def tuned(size, res, lr, **sections):
    """Batch 256 on 384 pixels, milder crops, the rate on a cosine that moves from epoch to epoch, no warm-up."""
    start = pretrain_of(size, 224)
    adamw = {k: v for k, v in start["optim"].items() if k not in ("decay_factor", "start_lr")}
    return c.stage(**{**start, **dict(
        init="@pretrain", optim=dict(adamw, lr=lr, schedule="cosine", warmup=0, end_lr=0.0, **sections.pop("optim", {})),
        data=dict(start["data"], batch=256, size=res, augment=AUGMENT.format(0.5), **sections.pop("data", {})),
        checkpoint=dict(every="1epoch", keep=2)), **sections})


def caption(size, res):
    """configs/caption_coco.yaml: 5 epochs of the decoder alone. 40 tokens with the prompt's three."""
    return tuned(size, res, SIZES[size][3], loss=dict(weights=dict(lm=1.0), label_smoothing=0.1, prompt="model"), optim=dict(clamps=()), data=dict(length=37),
                 evals=dict(caption=dict(kind="caption", options=BEAMS, every="1epoch")), steps="5epochs")


def retrieval(size, res):
    """configs/retrieval_coco.yaml: 6 epochs, negatives from all GPUs by the student's own similarity. COCO has 567K pairs: the ramp is an epoch."""
    return tuned(size, res, SIZES[size][4], data=dict(length=35), steps="6epochs",
                 loss=dict(weights=dict(itc=1.0, itm=1.0), momentum=0.995, queue=57600, alpha=0.4, alpha_ramp=567_000 // 256, targets="images",
                           mined_by="student"),
                 evals=dict(retrieval=dict(kind="retrieval", every="1epoch"), rerank=dict(RERANK, every=0)))


# ---- section 5.3 and 5.4: questions, two images

PAPER = "2201.12086"


def tasks(start, task):
    """The encoder reads the question, the decoder writes the answer beside what it found; for two images the encoder's cross-attention is doubled.
    ``task`` makes a stage of the preset's size."""
    model = {k: v for k, v in start["model"].items() if k not in ("embed", "temp", "prompt")} | dict(paper=PAPER)
    text = dict(model["text"], token_types=0)
    reader = dict(text, cross_layers=4 if text["variant"] == "mini" else 12)
    return dict(
        vqa=task("vqa", system="bert_vqa", model=dict(model, text=reader, decoder=text), data=dict(answers=10, answer_length=8),
                 loss=dict(weights=dict(answer=1.0), label_smoothing=0.1)),
        nlvr=task("nlvr", system="bert_classify", model=dict(model, text=dict(reader, pairing="twin"), classes=2),
                  data=dict(classes=("False", "True"), images=2, swap="sides"), loss=dict(weights=dict(cls=1.0))))


def scenes_task(name, data, **sections):
    start, of = scenes(48), {"vqa": "vqa", "nlvr": "pairs"}[name]
    scored = {"vqa": dict(vqa=dict(kind="vqa", examples=500, options=dict(k=16))), "nlvr": dict(classify=dict(kind="classify", examples=1000))}[name]
    return c.stage(**{**start, **dict(
        init="@pretrain", evals=scored, steps=300, data=dict(start["data"], train=f"scenes:train/{of}", eval=f"scenes:test/{of}", **data),
        optim=dict(start["optim"], lr=5e-4, muon_lr=0.01, groups=(), clamps=())), **sections})


def task(size, res, name, data, **sections):
    """configs/{vqa,nlvr}.yaml: 16 images on each of 16 GPUs; the cosine moves from epoch to epoch, no warm-up. A tenth of the image's layers is dropped."""
    pixels, lr, epochs, cleaned, length = {"vqa": (480, 2e-5, 10, "blip_question", 35), "nlvr": (384, 3e-5, 15, "blip(40)", 48)}[name]
    model = sections.pop("model")
    own = dict(answer="json:answer@0.2") if name == "vqa" else {}
    scored = {"vqa": dict(vqa=dict(kind="vqa", every=0)), "nlvr": dict(classify=dict(kind="classify", every="1epoch"))}[name]
    return tuned(size, res or pixels, lr, model=dict(model, image=dict(model["image"], drop_path=0.1)), optim=dict(clamps=()), evals=scored, steps=f"{epochs}epochs",
                 data=dict(data, **own, length=length, text_clean=cleaned), **sections)
