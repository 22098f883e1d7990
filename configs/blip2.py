"""BLIP-2: bootstrapping language-image pre-training with frozen image encoders and large language models (arXiv 2301.12597).

python -m vlm_jax.main --config=configs/blip2.py
    The embedded preset on procedural scenes, nine minutes on 2 quiet cores. There is no eye and no language model to take, so they come first:
    eye (CoCa's preset), language (a decoder) and, for the last stage, language_t5 (an encoder-decoder), which read scenes in words; all are frozen. pretrain
    and generate are the paper's two stages, vqa answers questions, generate_t5 is the second stage with the other language model. Captions of unseen scenes:
    CIDEr-D 3.4, 18% right in every fact; questions .54 right (docs/results.md).
python -m vlm_jax.main --config=configs/blip2.py:opt2.7b,eye=EYE,bert=BERT,language=OPT \\
    --config.stages.pretrain.data.train='tars:/data/{0000..0999}.tar' --config.stages.pretrain.data.tokenizer=bert:vocab.txt \\
    --config.stages.generate.data.train='tars:/data/{0000..0999}.tar' --config.stages.generate.data.tokenizer=OPT/tokenizer
    A published size (opt2.7b opt6.7b flant5xl flant5xxl; "vit=clip_l14" is the smaller eye) by the paper's recipe: pretrain teaches
    the Q-Former beside the eye, generate teaches it to speak to the language model. EYE, BERT and OPT are imported directories (releases
    eva, hf_bert, hf_opt or hf_t5, the language model with --dtype=bfloat16); what is left out is fresh.
python -m vlm_jax.main --config=configs/blip2.py:opt2.7b,eye=EYE,start=DIR --stage=caption --config.stages.caption.data.train=...
python -m vlm_jax.main --config=configs/blip2.py:opt2.7b,eye=EYE,start=DIR,words=FIRST,bert=BERT --stage=vqa --config.stages.vqa.data.train=...
    Captions (caption) and questions (vqa, which the queries read too) after the second stage, DIR, image-text retrieval (retrieval) after the first, FIRST, at
    364 pixels with the eye unfrozen. Both: a stage, or a LAVIS file imported with --release=blip2 --src=blip2_pretrained_opt2.7b.pth --image=eva_vit_g.pth
    --language=OPT_FROM_THE_HUB (FIRST: blip2_pretrained.pth, without a language model). BERT/tokenizer (imported with --tokenizer=bert:vocab.txt) reads the
    questions.
python -m vlm_jax.main --config=configs/blip2.py:opt2.7b,finetune,24gb,start=DIR \\
    --config.stages.caption.data.train=folder:photos --config.stages.caption.data.eval=folder:photos_val
python -m vlm_jax.main --config=configs/blip2.py:flant5xl,finetune,16gb,tune=lora,start=DIR --stage=vqa \\
    --config.stages.vqa.data.train='tars:/data/{00..09}.tar' --config.stages.vqa.data.eval=tars:/data/10.tar
    Captions or answers of one's own from a second stage (DIR), on one card of 24 GB (eye and language model in bfloat16) or of 16 GB (in int8); the Q-Former
    trains, or with tune=lora adapters in the language model. What the eye makes of an image is computed once: 0.72 MB of disk for each. Memory by the
    compiler, and what does not fit: docs/results.md, "Fine-tuning on one card". XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives JAX the card.
"""

from vlm_jax import config as c

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The eye's section, the images of a batch in stage 1 (section 3.4), how its positions are resized
EYES = {"eva_g14": (dict(variant="eva_g14"), 1680, "resize_positions_border"),
        "clip_l14": (dict(variant="l14", layers=23, activation="quick_gelu"), 2320, "resize_positions_corners")}
# The language model's section, its tokens, the batch of stage 2 (section 3.4), what ends a text where it is not the tokenizer's end
OPT_TOKENS, T5_TOKENS, LINE_BREAK = dict(vocab=50272, bos=2, eos=2, pad=1), dict(vocab=32128, eos=1, pad=0), 50118
LANGUAGES = {"opt2.7b": (dict(family="opt", variant="2.7b", dropout=0.1), OPT_TOKENS, 1920, LINE_BREAK),
             "opt6.7b": (dict(family="opt", variant="6.7b", dropout=0.1), OPT_TOKENS, 1920, LINE_BREAK),
             "flant5xl": (dict(family="t5", variant="xl", activation="gelu", dropout=0.1), T5_TOKENS, 1520, -1),
             "flant5xxl": (dict(family="t5", variant="xxl", activation="gelu", dropout=0.1), T5_TOKENS, 1520, -1)}
CROPS = "random_resized_crop(scale=0.5..1)|flip"      # lavis/processors/blip_processors.py: blip2_image_train
EYE_FROZEN, BOTH_FROZEN, LANGUAGE_FROZEN = (r"(?!image/).*",), (r"(?!(image|language)/).*",), (r"(?!language/).*",)
RERANK = dict(kind="rerank", options=dict(k=128, score="match+cosine"))      # lavis/projects/blip2/eval/ret_coco_eval.yaml
# What is frozen lies in these in fine-tuning on a card. By the compiler all 64 rows of a step pass at once (docs/results.md, "Fine-tuning on one card")
FROZEN, ON_ONE_CARD = {"24gb": "bfloat16", "16gb": "int8"}, ("opt2.7b", "flant5xl")
# Section 3.2: the encoder reads the beginning of a caption and the decoder writes the rest; where it is cut is not told. The released code does not cut
HALVES = dict(layout="apart", prompt_length=32, prefix="words")
PROMPTS = {"opt": "Question: {q} Answer:", "t5": "Question: {q} Short answer:"}      # section 4.1
# lavis/projects/blip2/eval/caption_coco_*.yaml, and what the captioning task passes where the yaml is silent
BEAMS = dict(method="beam", beams=5, max_length=30, min_length=8, length_penalty=0.0, repetition_penalty=1.15)


def get_config(arg=""):
    args = c.parse_arg(arg, size=("", "scenes", *LANGUAGES), job=("", "finetune"), memory=tuple(FROZEN), tune=("qformer", "lora"), vit=tuple(EYES), res=0,
                       eye="", bert="", language="", start="", words="")
    if args.job == "finetune":
        return on_one_card(args.size or "opt2.7b", args.memory, args.tune, args.start)
    if args.size in ("", "scenes"):
        order, named = scenes(args.res or 48)
        return c.stages(order, **named)
    resize = EYES[args.vit][2]
    seen = (("image/position_embed", f"{args.eye}:", resize), ("image/.*", f"{args.eye}:", "copy")) if args.eye else ()
    pretrain, generate = pretrain_of(args.vit, args.res or 224, args.eye, args.bert), generate_of(args.vit, args.size, args.res or 224, args.language)
    origin = {"pretrain": args.words or "@pretrain", "generate": args.start or "@generate"}
    after = {name: seen + (() if seen else (("image/position_embed", f"{start}:", resize),)) + (start,) for name, start in origin.items()}
    halved = dict(generate, data=dict(generate["data"], **(HALVES if LANGUAGES[args.size][0]["family"] == "t5" else {})))
    return c.stages(("pretrain", "generate"), pretrain=pretrain, generate=halved, caption=caption(generate, args.res or 364, after["generate"]),
                    vqa=vqa(pretrain, generate, args.res or 364, (words_of(origin["pretrain"]), *after["generate"]), args.bert),
                    retrieval=retrieval(pretrain, args.res or 364, after["pretrain"]))


# ---- scenes: an eye and two language models first, as there are none to take

ASKED = "scenes:test/count+colour+relation+existence+comparison"
QUESTION = dict(kind="vqa", template="question: {q} short answer:", options=dict(method="generate", beams=1))
MUON = dict(name="muon", lr=3e-3, muon_scale="width", b1=0.9, b2=0.98, momentum=0.95, weight_decay=0.01, schedule="trapezoid", warmup="5%", decay_from="50%",
            clip_norm=1.0, clamps=(), ema=0.0, max_bad_steps=10,
            muon_exclude=(r"(.*/)?(table|queries|position_embed|\w+_positions|lm_head/.*)",))
# What a question takes, and a description with a question behind it
PROMPTED, DESCRIBED = dict(prompt_length=24, length=32), dict(prompt_length=60, length=40)
FORMER = dict(variant="mini")      # 8 queries; 32 tell no more of so few objects (docs/results.md)
DECODER, ENCODER = dict(family="opt", variant="mini", positions=160), dict(family="t5", variant="mini")


def scenes(res):
    """The stages by name: "eye" (CoCa's preset, shorter) and "language" are frozen from "pretrain" on."""
    eye = c.from_file(f"configs/coca.py:scenes,res={res}").stages.pretrain.to_dict()
    data = dict(eye["data"], tokenizer="scenes_instruct", batch=32)
    tokens = dict(vocab=-1, bos=-1, eos=-1, pad=-1)
    saved = dict(checkpoint=dict(every=1000, keep=1))
    captions = dict(caption=dict(kind="caption", examples=500))
    eye = c.stage(**{**eye, **saved, **dict(data=dict(eye["data"], tokenizer="scenes_instruct"), evals=captions)})

    def language(tower, layout):
        return c.stage(system="single_tower", model=dict(language=tower, tokens=tokens, dtype="auto"), loss=dict(weights=dict(lm=1.0)),
                       optim=dict(MUON, muon_lr=0.01), steps=800, evals={}, **saved,
                       data=dict(data, **DESCRIBED, layout=layout, train="scenes:train/text", eval="scenes:test/text", images=0))

    own = dict(system="blip2", optim=dict(MUON, muon_lr=0.02), **saved)
    seen = dict(image=dict(eye["model"]["image"], norm=eye["model"]["norm"]), dtype="auto")
    pretrain = c.stage(
        **own, model=dict(seen, qformer=dict(FORMER, positions=64), embed=64, temp=0.07, tokens=dict(tokens, dec=-1)),
        loss=dict(weights=dict(itc=1.0, itm=1.0, itg=1.0), label_smoothing=0.1), trainable=EYE_FROZEN, init=(("image/.*", "@eye:", "copy"),),
        data=data, steps=200,
        evals=dict(retrieval=dict(kind="retrieval", examples=1000, options=dict(captions="first")),
                   rerank=dict(RERANK, examples=100, options=dict(RERANK["options"], captions="first", k=16)), **captions))

    def generate(tower, origin, layout):
        return c.stage(
            **dict(own, optim=dict(MUON, muon_lr=0.005)), model=dict(seen, qformer=FORMER, language=tower, tokens=tokens),
            loss=dict(weights=dict(lm=1.0)), trainable=BOTH_FROZEN,
            init=(("language/.*", f"@{origin}:", "copy"), ("projection/.*", "fresh", "copy"), "@pretrain"),
            data=dict(data, **PROMPTED, layout=layout, templates="scenes_caption"), steps=600,
            evals=dict(captions, questions=dict(QUESTION, examples=500, data=ASKED)))

    first = dict(eye=eye, language=language(DECODER, "joined"), pretrain=pretrain,
                 generate=generate(DECODER, "language", "joined"))
    second = dict(language_t5=language(ENCODER, "apart"), generate_t5=generate(ENCODER, "language_t5", "apart"))
    spoken = first["generate"]
    # Section 4.3 of the paper: the queries read the question too
    vqa = dict(spoken, model=dict(spoken["model"], qformer=pretrain["model"]["qformer"], instruction_tokens=dict(tokens, dec=-1)),
               init=(words_of("@pretrain"), "@generate"),
               trainable=LANGUAGE_FROZEN, steps=200, evals=dict(vqa=dict(QUESTION, template="", examples=500)),
               data=dict(spoken["data"], train="scenes:train/vqa", eval="scenes:test/vqa", templates=(QUESTION["template"],),
                         instruction_tokenizer="scenes_instruct", instruction_length=24))
    tuned = dict(optim=dict(MUON, lr=5e-4, muon_lr=5e-3), model="init", steps=200)
    named = dict(first, vqa=vqa, **second)
    return tuple(named), dict(
        named, caption=dict(spoken, **tuned, init="@generate", trainable=LANGUAGE_FROZEN, evals=captions),
        retrieval=dict(pretrain, **tuned, init="@pretrain", trainable=(".*",), loss=dict(pretrain["loss"], targets="images")))


# ---- as published

def common(vit, res):
    eye, _, _ = EYES[vit]
    return (dict(image=eye, qformer=dict(variant="base", dropout=0.1), mean=CLIP_MEAN, std=CLIP_STD, eps=1e-5, dtype="auto"),
            dict(name="adamw", lr=1e-4, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.05, schedule="cosine", warmup=2000, end_lr=1e-5, clamps=(),
                 ema=0.0, max_bad_steps=10),
            dict(train="", eval="", microbatch=0, size=res, length=32, tokenizer="", text_clean="blip(50)", augment=CROPS, eval_augment="squash",
                 threads=16, prefetch=4, block=64, window=1024, bad_budget=0.01))


def from_bert(bert):
    """BERT's layers by turns with and without cross-attention; each of its feed-forward parts twice. The row of [DEC] is new."""
    rules = []
    for name, first in (("cross", 0), ("plain1", 1)):
        rows, ours = f"[{first}..:2]", f"qformer/blocks/{name}"
        rules += [(rf"{ours}/(mlp|norm2)/(query|text)/(.*)", rf"{bert}:text/blocks/\1/\3{rows}", "copy"),
                  (rf"{ours}/((attn|norm1)/.*)", rf"{bert}:text/blocks/\1{rows}", "copy")]
    return (*rules, (r"qformer/(token_embed/table)", rf"{bert}:text/\1", "grow"), (r"qformer/(position_embed|embed_norm/.*)", rf"{bert}:text/\1", "copy"),
            ("lm_head/bias", f"{bert}:", "grow"), ("lm_head/.*", f"{bert}:", "copy"))


def pretrain_of(vit, res, eye, bert):
    """Section 3.4: 250K steps, AdamW with decay .05, 2,000 steps up to 1e-4, then a cosine, whose end, 1e-5, is the code's
    (pretrain_stage1.yaml). No clipping."""
    model, optim, data = common(vit, res)
    start = ((("image/position_embed", f"{eye}:", EYES[vit][2]), ("image/.*", f"{eye}:", "copy")) if eye else ()) + (from_bert(bert) if bert else ())
    return c.stage(
        system="blip2", model=dict(model, qformer=dict(model["qformer"], remat="full"), embed=256, temp=0.07,
                                   tokens=dict(vocab=30523, bos=101, eos=102, pad=0, dec=30522)),
        loss=dict(weights=dict(itc=1.0, itm=1.0, itg=1.0), label_smoothing=0.1), trainable=EYE_FROZEN, frozen_dtype="bfloat16", init=start, optim=optim,
        data=dict(data, batch=EYES[vit][1]), evals=dict(retrieval=dict(kind="retrieval", every=0), rerank=dict(RERANK, every=0)), steps=250_000,
        checkpoint=dict(every=5000, keep=3), rules="fsdp")


def generate_of(vit, size, res, language):
    """Section 3.4: 80K steps, down to 5e-5. The frozen language model drops units, as in the official code, which leaves it in training mode."""
    model, optim, data = common(vit, res)
    tower, tokens, batch, end = LANGUAGES[size]
    given = (("language/.*", f"{language}:", "copy"),) if language else (("language/.*", "fresh", "copy"),)
    return c.stage(
        system="blip2", model=dict(model, language=dict(tower, remat="full"), tokens=tokens, end=end),
        loss=dict(weights=dict(lm=1.0)),
        trainable=BOTH_FROZEN, frozen_dtype="bfloat16", init=(*given, ("projection/.*", "fresh", "copy"), "@pretrain"), optim=dict(optim, end_lr=5e-5),
        data=dict(data, batch=batch), evals=dict(caption=dict(kind="caption", options=BEAMS, every=0)), steps=80_000,
        checkpoint=dict(every=5000, keep=3), rules="fsdp")


def tuned(start, res, init, batch, epochs, **sections):
    """lavis/projects/blip2/train: 1,000 steps up from 1e-8 to 1e-5, then a cosine to 0; the eye trains too."""
    model = dict(start["model"], image=dict(start["model"]["image"], remat="full"), **sections.pop("model", {}))
    return c.stage(**{**start, **dict(
        model=model, init=init, data=dict(start["data"], batch=batch, size=res, **sections.pop("data", {})), steps=f"{epochs}epochs",
        checkpoint=dict(every="1epoch", keep=2), optim=dict(start["optim"], lr=1e-5, b2=0.999, warmup=1000, start_lr=1e-8, end_lr=0.0)), **sections})


def caption(start, res, init):
    """caption_coco_ft.yaml: 5 epochs, 16 images on each of 16 GPUs, every caption behind "a photo of"."""
    return tuned(start, res, init, 256, 5, model=dict(prompt="a photo of"), trainable=LANGUAGE_FROZEN, loss=dict(weights=dict(lm=1.0)),
                 evals=dict(caption=dict(kind="caption", options=BEAMS, every="1epoch")))


def words_of(first):
    """The Q-Former's words, which the second stage drops, from the first stage."""
    return r"qformer/((token|position)_embed.*|.*/text/.*)", f"{first}:", "copy"


def asked(family):
    """Questions as a language model of this family gets them; one answer, as often as people gave it."""
    return dict(text_clean="blip_question", layout="apart" if family == "t5" else "joined", templates=(PROMPTS[family],), prompt_length=32, length=12)


def vqa(first, start, res, init, bert):
    """Section 4.3: the queries read the question too. No code of it was released; rates and epochs are those of captioning."""
    family = start["model"]["language"]["family"]
    return tuned(start, res, init, 256, 5, trainable=LANGUAGE_FROZEN, loss=dict(weights=dict(lm=1.0)),
                 model=dict(qformer=first["model"]["qformer"], instruction_tokens=dict(vocab=30523, bos=101, eos=102, pad=0)),
                 data=dict(asked(family), instruction_tokenizer=f"{bert}/tokenizer" if bert else "", instruction_length=32 if bert else 0),
                 evals=dict(vqa=dict(kind="vqa", template=PROMPTS[family], options=dict(method="generate", beams=5), every="1epoch")))


def retrieval(start, res, init):
    """Images with several captions: texts of one image are positives of it. 14 images on each of 16 GPUs."""
    return tuned(start, res, init, 224, 5, trainable=(".*",), loss=dict(start["loss"], targets="images"), data=dict(length=35),
                 evals=dict(retrieval=dict(kind="retrieval", every="1epoch"), rerank=dict(RERANK, every=0)))


# ---- on one card

def on_one_card(size, memory, tune, start):
    """Captions and questions of one's own, from the second stage in ``start``. No paper's recipe: 64 pairs a step, five times each; the Q-Former's rate is that
    of fine-tuning, the adapters' a usual one."""
    if size not in ON_ONE_CARD:
        raise c.ConfigError(f"config argument {size!r} has no recipe for one card; nearest: {', '.join(ON_ONE_CARD)}, "
                            "or configs/instructblip.py:vicuna7b,finetune")
    base = generate_of("eva_g14", size, 224, "")
    family = base["model"]["language"]["family"]
    lora = tune == "lora"
    shared = dict(
        base, frozen_dtype=FROZEN[memory], init=start or "@generate", trainable=(r"language/.*/lora_[ab]",) if lora else BOTH_FROZEN,
        lora=dict(rank=16, alpha=32.0, targets=(r"language/.*/(query|key|value|out)/kernel",)) if lora else {},
        optim=dict(base["optim"], lr=5e-4 if lora else 1e-5, b2=0.999, warmup="5%", end_lr=0.0, weight_decay=0.0 if lora else 0.05), rules="dp",
        loss=dict(weights=dict(lm=1.0)), steps="5epochs", checkpoint=dict(every="1epoch", keep=2))
    model = dict(base["model"], qformer=dict(base["model"]["qformer"], remat="full"))
    data = dict(base["data"], batch=64, augment="squash", cache_features="features", threads=4, block=1, window=1,
                tokenizer=f"{start}/tokenizer" if start else "")
    captions = dict(kind="caption", options=BEAMS, every="1epoch", batch=8)
    answers = dict(kind="vqa", options=dict(method="generate", beams=5), every="1epoch", batch=8)
    return c.stages(
        ("caption",), generate=base,
        caption=c.stage(**dict(shared, model=dict(model, prompt="a photo of"), data=data, evals=dict(caption=captions), select=dict(metric="caption/CIDEr-D"))),
        vqa=c.stage(**dict(shared, model=model, data=dict(data, **asked(family)), evals=dict(vqa=dict(answers, template=PROMPTS[family])),
                           select=dict(metric="vqa/accuracy"))))
