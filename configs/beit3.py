"""BEiT-3: image as a foreign language (arXiv 2208.10442).

python -m vlm_jax.main --config=configs/beit3.py
    The embedded preset on procedural scenes, seven minutes on 2 CPU cores: a small CLIP, the VQ-KD tokenizer of images that learns from it
    (configs/vqkd.py), masked data modelling of a small tower, contrastive tuning (R@1 .21 among 1,000 unseen scenes; docs/results.md). ":targets=colours"
    needs no tokenizer: masked patches are told as bins of their mean colour.
python -m vlm_jax.main --config=configs/beit3.py --stage=vqa
    What it is tuned to from there: retrieval, vqa, nlvr, caption.
python -m vlm_jax.main --config=configs/beit3.py:base,tokenizer=DIR --config.stages.pretrain.data.train='tars:/data/{0000..0999}.tar' \\
    --config.stages.pretrain.data.tokenizer=xlmr:beit3.spm
    The paper's pre-training at a size (base, large: the released towers, whose own schedule is unpublished; giant: the paper's). DIR: a VQ-KD tokenizer,
    trained or imported (release vqkd); without it the stage "tokenizer" comes first and wants a CLIP (configs/vqkd.py:base).
python -m vlm_jax.main --config=configs/beit3.py:base,init=DIR --stage=vqa \\
    --config.stages.vqa.model.answers=answers.txt --config.stages.vqa.data.train=jsonl:vqa_train.json --config.stages.vqa.data.tokenizer=xlmr:beit3.spm
    Fine-tuning by the official recipes: retrieval, vqa, nlvr, caption, classes. DIR: a stage, or an imported file (release beit3).
"""

import functools

from vlm_jax import config as c

MASKED = dict(mim=1.0, mlm=1.0, pair_mim=1.0, pair_mlm=1.0)
FROZEN = r"(?!tokenizer/).*"
IMAGES_ALONE = r"(?!(.*/)?text/).*"      # what an image without a text learns
CONTRAST, ANSWERS, PAIRS, CLASSES = r"(image|text)_head/.*|logit_scale", r"(pooler|vqa_head)/.*", "pair_head/.*", "class_head/.*"      # heads that start fresh
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATEMENT = ("False", "True")
BEAMS = dict(method="beam", beams=3, length_penalty=0.6)      # beit3/run_beit3_finetuning.py
RANDAUG = "|rand_augment(n=2, m=7)"
CROPS = "random_resized_crop(scale=0.5..1)|flip"      # beit3/datasets.py: hflip for questions and captions too
VQKD = dict(kind="vqkd", encoder=dict(variant="beit_b16"), codes=8192, code_width=32)
# beit3/optim_factory.py: 1-D leaves, the image's positions, and not the text's
NO_DECAY = ("1d", "image/position_embed")
SCENE_ANSWERS = ("yes", "no", "zero", "one", "two", "three", "four", "five", "shiny", "matte", "striped", "solid", "hollow", "left", "right", "above", "below",
                 *(colour for colour in ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")),
                 *(form for shape in ("circle", "square", "triangle", "star", "heart", "cross") for form in (shape, f"the {shape}")))


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", "base", "large", "giant"), res=0, tokenizer="", init="", targets=("codes", "colours"))
    if args.size == "scenes":
        if args.targets == "colours":
            return c.stages(("pretrain", "itc"), **scenes(args.res or 48))
        first = c.from_file(f"configs/vqkd.py:scenes,res={args.res or 48}").stages.to_dict()
        return c.stages(("teacher", "tokenizer", "pretrain", "itc"), **first, **scenes(args.res or 48, first["tokenizer"]["model"]))
    first = {} if args.tokenizer else dict(tokenizer=c.from_file("configs/vqkd.py:base").stages.tokenizer.to_dict())
    return c.stages((*first, "pretrain", "itc"), **first, pretrain=pretrain(args.size, args.res or 224, args.tokenizer),
                    itc=itc(args.size, args.res or 224, args.init or "@pretrain"),
                    **({} if args.size == "giant" else tasks(args.size, args.res, args.init)))


def fresh(heads, origin="@pretrain"):
    return ((heads, "fresh", "copy"), origin)


def scenes(res, tokenizer=None):
    data = dict(train="scenes:train", eval="scenes:test", batch=96, microbatch=0, size=res, length=32, tokenizer="scenes", augment="squash",
                eval_augment="squash",
                threads=1, prefetch=8, bad_budget=0.01)
    model = dict(tower=dict(variant="mini"), targets=dict(kind="colours"), dtype="auto", tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1, mask=-1))
    optim = dict(name="muon", lr=2e-3, muon_lr=0.03, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01,
                 muon_exclude=(".*/table", ".*/position_embed", "(mlm|mim)_head/.*"), schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                 ema=0.0, max_bad_steps=10)
    start = dict(system="beit3", model=model, optim=optim, data=data, checkpoint=dict(every=500, keep=2))
    retrieved = dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")))

    def tuned(steps, lr=1e-3, muon_lr=0.02, origin=(), **sections):
        own = {k: v for k, v in optim.items() if k != "muon_exclude"}
        return c.stage(**{**start, **dict(init=origin, steps=steps, optim=dict(own, lr=lr, muon_lr=muon_lr, muon_exclude=(".*/table", ".*/position_embed"))),
                          **sections})

    def of(task, **more):
        return dict(data, train=f"scenes:train/{task}", eval=f"scenes:test/{task}", **more)

    loss = dict(weights=MASKED, image_masked=14, mask_min_cells=3)
    told = {} if tokenizer is None else dict(
        model=dict(model, targets=dict(kind="vqkd", **{k: tokenizer[k] for k in ("encoder", "codes", "code_width")})), init="@tokenizer", trainable=(FROZEN,))
    return dict(
        pretrain=c.stage(**{**start, **told}, loss=loss, steps=800),
        itc=tuned(300, loss=dict(weights=dict(itc=1.0)), origin=fresh(CONTRAST), evals=retrieved),
        retrieval=tuned(300, loss=dict(weights=dict(itc=1.0)), origin="@itc", evals=retrieved),
        vqa=tuned(400, loss=dict(weights=dict(vqa=1.0)), origin=fresh(ANSWERS), model=dict(model, answers=SCENE_ANSWERS),
                  data=dict(of("vqa"), answers=10, answer_length=8),
                  evals=dict(vqa=dict(kind="vqa", examples=1000))),
        nlvr=tuned(400, loss=dict(weights=dict(cls=1.0)), origin=fresh(PAIRS), model=dict(model, classes=2),
                   data=dict(of("pairs"), classes=STATEMENT, images=2),
                   evals=dict(classify=dict(kind="classify", examples=1000))),
        caption=tuned(400, loss=dict(weights=dict(cap=1.0), caption_share=0.7, label_smoothing=0.1), origin="@pretrain",
                      evals=dict(caption=dict(kind="caption", examples=300, options=BEAMS))))


def model_of(size, drop_path, **fields):
    return dict(tower=dict(variant=size, drop_path=drop_path, remat="full"), dtype="auto", tokens=dict(vocab=64010, bos=0, pad=1, eos=2, mask=64001), **fields)


def data_of(batch, res, **fields):
    return dict(train="", eval="", batch=batch, microbatch=0, size=res, length=64, tokenizer="", augment=CROPS, eval_augment="squash", threads=16, prefetch=4,
                block=64,
                window=1024, bad_budget=0.01, **fields)


def adamw(lr, warmup, decay, **fields):
    return {**dict(name="adamw", lr=lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=decay, decay_exclude=NO_DECAY, schedule="cosine", warmup=warmup, end_lr=1e-6,
                   ema=0.0,
                   max_bad_steps=10), **fields}


def pretrain(size, res, tokenizer):
    """Section 2.3 of the paper: a million steps of 2,048 images, 2,048 texts and 2,048 pairs. Our sources are of pairs: of each three
    rows the first gives its image alone, the second its text alone. What is not published: the weights of the terms, whether both sides of a pair
    are masked at once, the crops.
    A giant's 16 x 16 patches have 98 masked, the share of 75 in 14 x 14."""
    patch = 14 if size == "giant" else 16
    targets = dict(VQKD, encoder=dict(VQKD["encoder"], patch=patch))
    return c.stage(
        system="beit3", model=model_of(size, 0.1, targets=targets), trainable=(FROZEN,), init=tokenizer or "@tokenizer",
        loss=dict(weights=MASKED, streams=dict(image=1, text=1, pair=1), image_masked=round(75 / 196 * (res // patch) ** 2), pair_masks="both"),
        optim=adamw(1e-3, 10_000, 0.05, b2=0.98, eps=1e-6, clip_norm=3.0, end_lr=0.0),
        data=dict(data_of(6144, res), augment="random_resized_crop(scale=0.5..1)|flip|color_jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0, p=1)"),
        steps=1_000_000, checkpoint=dict(every=5000, keep=3), rules="fsdp")


def itc(size, res, start):
    """Appendix of the paper: 5 epochs of pairs, batch 16k, before retrieval."""
    return c.stage(
        system="beit3", model=model_of(size, 0.3), init=fresh(CONTRAST, start), loss=dict(weights=dict(itc=1.0)),
        optim=adamw(3e-5, "1epoch", 0.05, layer_decay=0.95), data=data_of(16_384, res), evals=dict(retrieval=dict(kind="retrieval", every="1epoch")),
        steps="5epochs",
        checkpoint=dict(every="1epoch", keep=2), rules="fsdp")


def tasks(size, res, start):
    """beit3/README.md and get_started/*.md: AdamW, cosine to 1e-6; ``layer_decay`` ^ (layers + 1 - i) of the rate in layer i. From the plain or the
    "indomain" weights (NLVR2: 5e-4 and 1e-4 from these), retrieval from "itc" ones."""
    large, pretrained = size == "large", start or "@pretrain"

    def pick(base, other):
        return other if large else base

    def stage(name, pixels, batch, epochs, optim, drop_path, loss, origin, data=None, evals=None, every="1epoch", trainable=(".*",), **model):
        return c.stage(system="beit3", model=model_of(size, drop_path, **model), init=origin, loss=loss, optim=optim, trainable=trainable,
                       data={**data_of(batch, res or pixels), **(data or {})}, evals={name: dict(evals, every=every)} if evals else {}, steps=f"{epochs}epochs",
                       checkpoint=dict(every="1epoch", keep=2))

    decayed = functools.partial(adamw, layer_decay=pick(0.65, 0.85))
    return dict(
        retrieval=stage("retrieval", 384, 3072, 15, decayed(pick(2e-4, 5e-5), "3epochs", 0.05), 0.2, dict(weights=dict(itc=1.0)), start or "@itc",
                        evals=dict(kind="retrieval")),      # Flickr30K: 1e-4 (base), 20 epochs, warm-up 5
        vqa=stage("vqa", 480, 128, 10, adamw(pick(3e-5, 2e-5), "1epoch", 0.01, b2=0.98, groups=(("vqa_head/.*", dict(lr=20.0)),)), pick(0.1, 0.15),
                  dict(weights=dict(vqa=1.0)), fresh(ANSWERS, pretrained), data=dict(answers=10, answer_length=12, augment=CROPS + RANDAUG),
                  evals=dict(kind="vqa"), every=0, answers="", classes=3129),
        nlvr=stage("classify", 224, 256, 20, decayed(pick(7e-4, 3e-4), "5epochs", 0.2), 0.2, dict(weights=dict(cls=1.0)), fresh(PAIRS, pretrained),
                   data=dict(images=2, classes=STATEMENT), evals=dict(kind="classify"), classes=2),
        caption=stage("caption", 480, 256, 10, adamw(pick(4e-5, 8e-6), "1epoch", 0.05), 0.1,
                      dict(weights=dict(cap=1.0), caption_share=0.7, label_smoothing=0.1, drop_worst=0.2, drop_worst_after=12_000), pretrained,
                      data=dict(length=32, augment=CROPS + RANDAUG), evals=dict(kind="caption", options=BEAMS)),
        classes=stage("classify", 224, 1024, 50, adamw(pick(7e-4, 2e-4), "5epochs", 0.05, layer_decay=pick(0.65, 0.8)), pick(0.15, 0.25),
                      dict(weights=dict(cls=1.0), mixup=0.8, cutmix=1.0, label_smoothing=0.1), fresh(CLASSES, pretrained),
                      data=dict(augment="random_resized_crop(scale=0.08..1)|flip|rand_augment(n=2, m=9)|random_erasing(p=0.25, mean=0.449, std=0.226)",
                                eval_augment="resize|center_crop"),
                      evals=dict(kind="classify"), trainable=(IMAGES_ALONE,), classes=1000, mean=IMAGENET_MEAN, std=IMAGENET_STD))
