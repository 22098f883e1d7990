"""VLMo: unified vision-language pre-training with mixture-of-modality-experts (arXiv 2111.02358).

python -m vlm_jax.main --config=configs/vlmo.py
    The embedded preset: images alone, texts alone, both together, on procedural scenes, six and a half minutes on 2 CPU cores: among 500 unseen scenes R@1
    .47 text to image, .48 image to text (docs/results.md).
python -m vlm_jax.main --config=configs/vlmo.py:base,vision=BEIT --config.stages.language.data.train=... --config.stages.joint.data.train=... \\
    --config.stages.language.data.tokenizer=bert:vocab.txt --config.stages.joint.data.tokenizer=bert:vocab.txt
    The paper's sizes (base, base_plus, large) and recipe. BEIT: a directory imported with --release=beit; without it the first stage is trained
    here: ":base,tokenizer=DIR" tells masked patches as the codes of a VQ-KD tokenizer, trained (configs/vqkd.py:base) or imported (--release=vqkd), ":base"
    alone as colours, a stand-in. The stage of texts looks for no images: its data may have none.
    ":base,language=DIR" goes on from an imported *_stage2.pt, ":base,joint=DIR" with the stages below from a pre-trained one (--release=vlmo).
python -m vlm_jax.main --config=configs/vlmo.py:base,joint=DIR --stage=retrieval --config.stages.retrieval.data.train=...
    Image-text retrieval (retrieval), questions (vqa: --config.stages.vqa.model.answers=FILE, one a line), statements about two images (nlvr).
"""

import itertools

from vlm_jax import config as c

FROZEN = r"(?!tokenizer/).*"
VQKD = dict(kind="vqkd", encoder=dict(variant="beit_b16"), codes=8192, code_width=32)
AUGMENT = "random_resized_crop(scale=0.5..1)|flip|rand_augment(n=2, m=7)"
STATEMENT = ("False", "True")
JOINT_HEADS = ("pooler", "mlm", "itm", "itc", "itc_vl")
ALONE, EXPERTS = ("text", "image"), ("text", "image", "vl")
# What a stage has that the one before it has not
TEXT_PARTS = r"(text|lm_head|position_bias/text)/?.*|type_embed|lm_table|blocks(_vl)?/(mlp|norm2)/text/.*"
FUSED_PARTS = r"blocks_vl/(mlp|norm2)/vl/.*|(pooler|itm_head|(image|text)(_vl)?_head)/.*|logit(_vl)?_scale"
# vlmo/run.py: what texts alone train. A table of positions that is not added does not train (nor decay)
TEXT_TRAINED = r"text/{}.*|type_embed|blocks(_vl)?/(mlp|norm2)/text/.*|lm_head/.*|lm_table|position_bias/.*|norm/.*"
UNUSED = "(?!position_embed)"
# vlmo/modules/vlmo_utils.py names by substring what does not decay: the experts' norms, scales of layers and of logits, and token types do
NO_DECAY = r"(.*/)?bias|position_bias/.*|(.*/)?norm1/scale|norm/scale|text/embed_norm/scale|lm_head/norm/scale"
COLOURS = ("white", "yellow", "blue", "orange", "green", "cyan", "purple", "red")
SHAPES = ("heart", "circle", "square", "cross", "star", "triangle")
ANSWERS = (*"yes no zero one two three shiny matte solid hollow striped left right above below".split(), *COLOURS, *SHAPES, *(f"the {s}" for s in SHAPES),
           *(f"the {colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)))

# size -> (learning rate of pairs, GPUs, then of retrieval, questions and statements: learning rate, drop path); base's 64 V100, large's 128 from the paper
RECIPE = {"base": (2e-4, 64, (3e-5, 0.2), (3e-5, 0.15), (5e-5, 0.1)), "base_plus": (1e-4, 64, (3e-5, 0.2), (3e-5, 0.15), (3e-5, 0.2)),
          "large": (5e-5, 128, (2e-5, 0.2), (1.5e-5, 0.15), (3e-5, 0.15))}


def get_config(arg=""):
    args = c.parse_arg(arg, size=("scenes", *RECIPE), res=0, tokenizer="", vision="", language="", joint="")
    given = {name: args[name] for name in ("vision", "language", "joint")}
    start = {name: found or f"@{name}" for name, found in given.items()}
    last = max((i for i, found in enumerate(given.values()) if found), default=-1)
    order = tuple(given)[last + 1:] or ("retrieval",)
    build = scenes if args.size == "scenes" else paper(args.size, args.res)
    return c.stages(order, **{name: build(name, init, **sections) for name, init, sections in stages(start, args.tokenizer)})


def stages(start, tokenizer):
    """(name, init, what is the same in all sizes) of each stage."""
    yield "vision", tokenizer or (), dict(trunk=dict(experts=("image",)), model=dict(heads=("mim",), targets=VQKD if tokenizer else dict(kind="colours")),
                                          loss=dict(weights=dict(mim=1.0)))
    yield "language", ((TEXT_PARTS, "fresh", "copy"), start["vision"]), dict(
        trunk=dict(experts=ALONE), model=dict(heads=("mlm",), pieces=()), loss=dict(weights=dict(textmlm=1.0)), data=dict(images=0))
    yield "joint", (("text/position_embed", f"{start['language']}:", "first_rows"), (FUSED_PARTS, "fresh", "copy"), start["language"]), dict(
        trunk=dict(experts=EXPERTS), model=dict(heads=JOINT_HEADS, pieces=()), loss=dict(weights=dict(itc=1.0, itm=1.0, mlm=0.25)))
    yield "retrieval", (start["joint"],), dict(trunk=dict(experts=ALONE), model=dict(heads=("itc",)), loss=dict(weights=dict(itc=1.0)))
    yield "vqa", (("vqa_head/.*", "fresh", "copy"), start["joint"]), dict(
        trunk=dict(experts=EXPERTS), model=dict(heads=("pooler", "vqa"), answers="", answer_ids=()), loss=dict(weights=dict(vqa=1.0)),
        data=dict(answers=10, answer_length=8))
    yield "nlvr", (("nlvr_head/.*", "fresh", "copy"), ("type_embed", f"{start['joint']}:", "grow_last"), start["joint"]), dict(
        trunk=dict(experts=EXPERTS, types=3), model=dict(heads=("pooler", "nlvr")), loss=dict(weights=dict(nlvr=1.0)), data=dict(images=2, classes=STATEMENT))


def scenes(name, init, trunk, model, loss, data=()):
    tasks = {"vqa": "/vqa", "nlvr": "/pairs"}
    model = dict(model, **(dict(answers=ANSWERS) if name == "vqa" else {}))
    tuned = name in ("retrieval", "vqa", "nlvr")
    if name in ("language", "joint"):
        loss = dict(loss, mask_share=0.3)      # a word in seven of short captions says little
    found = dict(kind="retrieval", examples=500, options=dict(captions="first"))
    scored = dict(joint=dict(retrieval=found, matching=dict(kind="matching", examples=500)), retrieval=dict(retrieval=found),
                  vqa=dict(vqa=dict(kind="vqa", examples=500, options=dict(candidates=ANSWERS, k=1))), nlvr=dict(classify=dict(kind="classify", examples=1000)))
    return c.stage(
        system="vlmo", init=init, trainable=(trained(name, "relative"),), loss=loss,
        model=dict(trunk=dict(variant="mini", text_positions=32, **trunk), dtype="auto", tokens=dict(vocab=-1, bos=-1, eos=-1, pad=-1, mask=-1), **model),
        optim=dict(name="muon", lr=1e-3 if tuned else 2e-3, muon_lr=0.01 if tuned else 0.02, muon_scale="width", b1=0.9, b2=0.98,
                   momentum=0.95, weight_decay=0.01, schedule="trapezoid", warmup="5%", decay_from="50%", clip_norm=1.0,
                   clamps=((".*_scale", 0.0, 4.6),) if name in ("joint", "retrieval") else (), ema=0.0, max_bad_steps=10),
        data=dict(train=f"scenes:train{tasks.get(name, '')}", eval=f"scenes:test{tasks.get(name, '')}", batch=48 if name == "vision" else 32,
                  microbatch=0, size=48, length=32, tokenizer="scenes", augment="squash", eval_augment="squash", threads=1, prefetch=8,
                  bad_budget=0.01, **dict(data)),
        evals=scored.get(name, {}), steps={"vision": 200, "language": 200, "joint": 1200}.get(name, 300), checkpoint=dict(every=500, keep=2))


def trained(name, positions):
    """A regex of what a stage trains."""
    if name == "vision":
        return FROZEN
    unused = UNUSED if positions == "relative" else ""
    return TEXT_TRAINED.format(unused) if name == "language" else r"(?!text/position_embed$).*" if unused else ".*"


def paper(size, res):
    """vlmo/config.py and its README: AdamW, b2 .98, decay .01, linear decay to 0 after a warm-up, no clipping. The first stage, where it is trained
    here, has BEiT's recipe (arXiv 2106.08254, section 2.5)."""
    lr, ranks, retrieval, vqa, nlvr = RECIPE[size]
    tuned = {"retrieval": (*retrieval, 3072, 3000, 300, 384), "vqa": (*vqa, 128, "10epochs", "10%", 480), "nlvr": (*nlvr, 128, "10epochs", "10%", 384)}
    recipes = {"vision": (1.5e-3, 0.1, 2048, "800epochs", "10epochs", 224), "language": (2e-4, 0.1, 1024, 500_000 if size != "large" else 200_000, 2500, 224),
               "joint": (lr, 0.1, 1024, 200_000, 2500, 224), **tuned}
    positions = "absolute" if size == "base_plus" else "relative"
    found = dict(retrieval=dict(kind="retrieval", every=0))
    scored = dict(joint=found, retrieval=found, vqa=dict(vqa=dict(kind="vqa", every=0)),
                  nlvr=dict(classify=dict(kind="classify", every="1epoch")))

    def build(name, init, trunk, model, loss, data=()):
        rate, drop, batch, steps, warmup, pixels = recipes[name]
        length = 196 if name == "language" else 40
        if name in ("language", "joint"):
            loss = dict(loss, masking="words", **(dict(ranks=ranks) if name == "joint" else {}))
        if name == "vqa":
            model = dict(model, classes=3129)
        own = dict(b2=0.999, weight_decay=0.05, schedule="cosine", end_lr=1e-5, clip_norm=3.0, decay_exclude=("1d",)) if name == "vision" else {}
        if name == "vqa":
            own = dict(groups=(("vqa_head/.*", dict(lr=20.0)),))
        return c.stage(
            system="vlmo", init=init, trainable=(trained(name, positions),), loss=loss,
            model=dict(trunk=dict(variant=size, text_positions=length, drop_path=drop, remat="full", **trunk), dtype="auto",
                       tokens=dict(vocab=30522, bos=101, eos=102, pad=0, mask=103), **model),
            optim=dict(dict(name="adamw", lr=rate, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, decay_exclude=(NO_DECAY,), schedule="linear",
                            warmup=warmup, clamps=(), ema=0.0, max_bad_steps=10), **own),
            data=dict(train="", eval="", batch=batch, microbatch=0, size=res or pixels, length=length, tokenizer="bert", augment=AUGMENT,
                      eval_augment="squash", threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01,
                      **(dict(answer="json:answer") if name == "vqa" else {}), **dict(data)),
            evals=scored.get(name, {}), steps=steps, checkpoint=dict(every=2000, keep=3))

    return build
