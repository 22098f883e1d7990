"""InstructBLIP: towards general-purpose vision-language models with instruction tuning (arXiv 2305.06500).

python -m vlm_jax.main --config=configs/instructblip.py
    The embedded preset on procedural scenes: the first four stages of configs/blip2.py (the same --workdir goes on from them), then the queries learn to
    read instructions of all kinds but comparisons and videos, which are evaluated too. Two minutes more on 2 CPU cores: questions .56 right, colours .89
    (docs/results.md).
python -m vlm_jax.main --config=configs/instructblip.py:vicuna7b,start=DIR,words=STAGE1,bert=vocab.txt,data=/data \\
    --config.stages.instruct.data.tokenizer=DIR/tokenizer
    A published size (vicuna7b vicuna13b flant5xl flant5xxl) by the paper's recipe on its 13 data sets, and its evaluations on the 13 that it never
    saw, in one command. DIR: BLIP-2's second stage with the same language model: a stage of configs/blip2.py, or an import. STAGE1: its first stage,
    which has the Q-Former's words; what is left out is fresh. vocab.txt is that of bert-base-uncased. /data holds the sets as docs/data_sets.md says,
    each in the folder named below.
python -m vlm_jax.main --config=configs/instructblip.py:vicuna7b,language=VICUNA,words=STAGE1,...
    For Vicuna, of whose second stage nothing was released: that stage first, by BLIP-2's recipe, with an imported language model (release hf_llama,
    --dtype=bfloat16). With OPT and Flan-T5 configs/blip2.py trains it.
python -m vlm_jax.importers.cli --release=blip2 --src=instruct_blip_vicuna7b_trimmed.pth --image=eva_vit_g.pth --language=VICUNA_V1.1 --out=DIR
python -m vlm_jax.importers.cli --release=hf_blip2 --src=hf:Salesforce/instructblip-vicuna-7b --out=DIR --dtype=bfloat16
    The released weights; --export=hf_blip2 writes what transformers opens.
python -m vlm_jax.main --config=configs/instructblip.py:vicuna7b,finetune,24gb,start=DIR --stage=caption \\
    --config.stages.caption.data.train=folder:photos --config.stages.caption.data.eval=folder:photos_val
    Captions (caption) or answers (vqa) of one's own, on one card of 24 GB or 16 GB, as in configs/blip2.py.
"""

from vlm_jax import config as c

# The language model's section and tokens where configs/blip2.py has none; Vicuna 1.1, with a row for padding. Its tokenizer's begin is its end, 2, but
# texts are generated behind 1.
VICUNA = {"vicuna7b": dict(family="llama", variant="7b"), "vicuna13b": dict(family="llama", variant="13b")}
VICUNA_TOKENS, VICUNA_MARKS = dict(vocab=32001, bos=2, eos=2, pad=32000), dict(begin=2, pad=32000, candidate_end="none")
BATCHES = {"vicuna7b": 128, "vicuna13b": 64, "flant5xl": 192, "flant5xxl": 64}      # section 3.2
FROZEN = (r"(?!(image|language)/).*",)

# ---- data sets: name and folder under data=

HELD_IN = (("coco_caption", "coco"), ("capfilt", "capfilt"), ("textcaps", "textcaps"), ("vqav2", "vqa"), ("okvqa", "okvqa"), ("aokvqa", "aokvqa"),
           ("ocrvqa", "ocrvqa"), ("vqg_vqav2", "vqa"), ("vqg_okvqa", "okvqa"), ("vqg_aokvqa", "aokvqa"), ("llava_conversation", "llava"),
           ("llava_detail", "llava"), ("llava_reasoning", "llava"))
# Shares are the roots of sizes as the paper counts them: VQAv2 by its 82 thousand images. It then lowered A-OKVQA and raised OKVQA by hand and does not say
# how far: those two factors are ours.
VQA_BY_IMAGES = (82 / 444) ** 0.5
FACTORS = dict(vqav2=VQA_BY_IMAGES, vqg_vqav2=VQA_BY_IMAGES, aokvqa=0.5, okvqa=2.0)
# What a caption is asked for, and how it and answers are written: lavis/projects/instructblip and its tasks
CAPTION = dict(kind="caption", template="A short image caption.", options=dict(
    method="beam", beams=5, max_length=80, min_length=10, length_penalty=1.0, repetition_penalty=1.15))
ANSWER = dict(kind="vqa", template="Question: {q} Short answer:", options=dict(method="generate", beams=5, max_length=10))
NO_YES = (("no", "false"), ("yes", "true"))


def ranked(train):
    """The most frequent training answers, all of them scored."""
    return dict(kind="vqa", template="Question: {q} Short answer:", images=4, train=train, options=dict(method="rank", candidates="train:1000"))


def held_out(root):
    """The 13 sets that are never trained on: name -> evaluation at the end."""
    def of(name, split, setting, folder=""):
        return name, dict(dict(every=0, data=f"published:{name}:{split}:{root}/{folder or name}"), **setting)

    choice = dict(kind="choice")
    said = dict(choice, options=dict(verbalisers=NO_YES))
    return dict((
        of("nocaps", "val", CAPTION), of("flickr30k", "test", CAPTION), of("vizwiz", "val", ANSWER), of("textvqa", "val", ANSWER),
        of("gqa", "testdev", ANSWER), of("scienceqa", "test", choice), of("iconqa", "test", choice), of("visdial", "val", choice),
        of("vsr", "test", said), of("hateful_memes", "val", said), of("ivqa", "test", dict(ANSWER, images=4)),
        of("msvd_qa", "test", ranked(f"published:msvd_qa:train:{root}/msvd_qa")),
        of("msrvtt_qa", "test", ranked(f"published:msrvtt_qa:train:{root}/msrvtt_qa"))))


def held_in(root):
    return ";".join(f"published:{name}:train:{root}/{folder}@{FACTORS.get(name, 1.0):.4g}" for name, folder in HELD_IN)


def get_config(arg=""):
    args = c.parse_arg(arg, size=("", "scenes", *BATCHES), job=("", "finetune"), memory=("24gb", "16gb"), tune=("qformer", "lora"), res=0, start="", words="",
                       bert="", data="", language="")
    if args.job == "finetune":
        return on_one_card(args.size or "vicuna7b", args.memory, args.tune, args.start, args.bert)
    if args.size in ("", "scenes"):
        return scenes(args.res or 48)
    if args.language and (args.start or args.size not in VICUNA):
        raise c.ConfigError(f"language={args.language!r} is for Vicuna's second stage, where start= names none; nearest: start={args.start or 'DIR'}")
    second = dict(generate=generate(args.size, args.res or 224, args.words, args.language)) if args.language else {}
    start = "@generate" if second else args.start
    return c.stages((*second, "instruct"), instruct=instruct(args.size, args.res or 224, start, args.words, args.bert, args.data), **second)


# ---- scenes: comparisons and videos are held out

HELD_IN_TASKS = "caption+detail+count+colour+relation+existence+vqg+dialogue+choice"


def scenes(res):
    """Tokens, prompts and replies of scenes are short: 48 ids and 32 hold almost all."""
    before = c.from_file(f"configs/blip2.py:scenes,res={res}").stages.to_dict()
    pretrain, generate = before["pretrain"], before["generate"]
    tokens = dict(vocab=-1, bos=-1, eos=-1, pad=-1)
    asked = dict(kind="vqa", examples=500, options=dict(method="generate", beams=1))
    instruct = dict(
        generate, model=dict(generate["model"], qformer=pretrain["model"]["qformer"], instruction_tokens=dict(tokens, dec=-1)), steps=500,
        init=((r"qformer/((token|position)_embed.*|.*/text/.*)", "@pretrain:", "copy"), "@generate"),
        data=dict(generate["data"], train=f"scenes:train/{HELD_IN_TASKS}", eval="scenes:test/instruct", templates="task", prompt_length=48, length=32,
                  instruction_tokenizer="scenes_instruct", instruction_length=48),
        evals=dict(caption=dict(kind="caption", examples=300, data="scenes:test/caption"),
                   questions=dict(asked, data="scenes:test/count+colour+relation+existence"),
                   choice=dict(kind="choice", examples=300, data="scenes:test/choice"),
                   held_out=dict(asked, examples=300, data="scenes:test/comparison"), video=dict(asked, examples=200, data="scenes:test/video", images=4)))
    order = ("eye", "language", "pretrain", "generate")      # folders have the numbers that configs/blip2.py gives them
    return c.stages((*order, "instruct"), **{name: before[name] for name in order}, instruct=instruct)


# ---- as published

def padded(origin):
    """Vicuna's tables with a row for padding more."""
    return (r"language/token_embed/table", f"{origin}:", "grow"), (r"language/lm_head/kernel", f"{origin}:", "grow_columns")


def from_blip2(start, words, vicuna):
    """The second stage of BLIP-2 has all but the Q-Former's words, which are those of the first."""
    text = ((r"qformer/((token|position)_embed.*|.*/text/.*)", f"{words}:" if words else "fresh", "copy"),)
    return (*text, *(padded(start) if vicuna else ()), start)


def generate(size, res, words, language):
    """BLIP-2's second stage, whose recipe is that of configs/blip2.py, with Vicuna. Its batch is OPT's."""
    base = c.from_file(f"configs/blip2.py:opt2.7b,res={res}").stages.generate.to_dict()
    return c.stage(**{**base, **dict(
        model=dict(base["model"], end=-1, first=1, language=dict(VICUNA[size], remat="full"), tokens=VICUNA_TOKENS),
        data=dict(base["data"], layout="joined", prompt_length=1, marks=VICUNA_MARKS),
        init=(*padded(language), ("language/.*", f"{language}:", "copy"), ("projection/.*", "fresh", "copy"), words or (".*", "fresh", "copy")))})


def instruct(size, res, start, words, bert, root):
    """Section 3.2: 60K steps, validated every 3K; up to 1e-5 in 1,000 steps from 1e-8, then a cosine to 0. The eye and the language model are frozen.
    Lengths are lavis's. It validates on all held-in sets; here on VQAv2 alone."""
    vicuna = size in VICUNA
    base = c.from_file(f"configs/blip2.py:{'opt2.7b' if vicuna else size}").stages.generate.to_dict()
    model = dict(base["model"], end=-1, instruction_tokens=dict(vocab=30523, bos=101, eos=102, pad=0))
    if vicuna:
        model |= dict(language=dict(VICUNA[size], remat="full"), tokens=VICUNA_TOKENS, first=1)
    data = dict(base["data"], train=held_in(root) if root else "", eval=f"published:vqav2:val:{root}/vqa" if root else "",
                mixture="sqrt" if root else "", batch=BATCHES[size], size=res, text_clean="", layout="joined" if vicuna else "apart", prefix="", prompt_length=128,
                length=256, instruction_length=128 if bert else 0, instruction_tokenizer=f"bert:{bert}" if bert else "", templates="task",
                marks=VICUNA_MARKS if vicuna else {})
    evals = dict(vqav2=dict(ANSWER, examples=5000, every=3000), **held_out(root)) if root else {}
    return c.stage(**{**base, **dict(
        model=model, data=data, loss=dict(weights=dict(lm=1.0)), trainable=FROZEN, steps=60_000, evals=evals,
        init=from_blip2(start, words, vicuna) if start else (),
        optim=dict(base["optim"], lr=1e-5, b1=0.9, b2=0.999, warmup=1000, start_lr=1e-8, end_lr=0.0), checkpoint=dict(every=3000, keep=2),
        select=dict(metric="vqav2/accuracy") if root else {})})


# ---- on one card

def on_one_card(size, memory, tune, start, bert):
    """The recipes of configs/blip2.py with queries that read what is asked. The Q-Former's words are those of bert-base-uncased, or lie in ``start``."""
    if size != "vicuna7b":
        raise c.ConfigError(f"config argument {size!r} has no recipe for one card here; nearest: vicuna7b, or configs/blip2.py:flant5xl,finetune")
    base = instruct(size, 224, "", "", bert, "")
    found = c.from_file(f"configs/blip2.py:opt2.7b,finetune,{memory},tune={tune},start={start}").stages.to_dict()
    words = f"bert:{bert}" if bert else f"{start}/instruction_tokenizer" if start else ""

    def stage(name, template, reply, **evals):
        own = found[name]
        data = dict(own["data"], layout="joined", templates=(template,), prompt_length=32, length=reply, instruction_tokenizer=words,
                    instruction_length=32 if words else 0, text_clean="", marks=VICUNA_MARKS)
        model = dict(base["model"], qformer=dict(base["model"]["qformer"], remat="full"))
        return c.stage(**dict(own, model=model, data=data, evals=evals, init=start or "@instruct"))

    return c.stages(("caption",), instruct=base, caption=stage("caption", CAPTION["template"], 32, caption=dict(CAPTION, every="1epoch", batch=2)),
                    vqa=stage("vqa", ANSWER["template"], 12, vqa=dict(ANSWER, every="1epoch", batch=2)))
