"""transformers' BERT and BLIP and timm's ViT against ours, where no released weights are needed; and one where they are.

    pip install -e ".[parity]"
    python -m tests.parity.hugging_face store            renews official_outputs/{hf_bert,timm_vit,eva}
    python -m tests.parity.hugging_face store_language   renews official_outputs/{hf_opt,hf_llama,hf_t5}
    python -m tests.parity.hugging_face store_blip2      renews official_outputs/hf_{blip2,instructblip}_*
    python -m tests.parity.hugging_face exports          transformers opens our exports of its BLIP, BLIP-2 and InstructBLIP models
    python -m tests.parity.hugging_face blip2_exports    of BLIP-2 and InstructBLIP alone
    python -m tests.parity.hugging_face sentences DIR    embeddings of a BERT for sentences (all-MiniLM-L6-v2), mean over its tokens

The last two print the largest difference from ours; exit code 1 where it is above 1e-4.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch

import vlm_jax
from tests.parity import official
from vlm_jax.importers import cli

OUTPUTS = pathlib.Path(__file__).parent / "official_outputs"
SENTENCES = ("a red circle above a blue square", "A dog is running on the beach.", "Two people ride bicycles through the rain, laughing.",
             "photosynthesis", "How do I reset my password?", "The committee's decision -- which nobody had expected -- was announced at 10:30 a.m. on Friday.")


def quiet(line: str) -> None:
    pass


def store() -> None:
    """A BertForMaskedLM and a timm ViT of odd sizes, with what they answer."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=120, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
                        max_position_embeddings=20, layer_norm_eps=1e-3)
    net = official.draw(BertForMaskedLM(config), 20)
    net.save_pretrained(OUTPUTS / "hf_bert")
    _, ids = official.inputs(8, 12, 120, 102, 20, (12, 3, 7))
    mask = ids != 0
    with torch.no_grad():
        out = net(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    np.savez_compressed(OUTPUTS / "hf_bert" / "io.npz",
                        in_ids=ids.numpy().astype(np.int32), in_mask=mask.numpy(), out_states=out.hidden_states[-1].numpy(), out_logits=out.logits.numpy())

    net = official.draw(VisionTransformer(img_size=24, patch_size=6, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5, num_classes=5), 21)
    image, _ = official.inputs(24, 4, 60, 59, 21, (4, 4))
    (OUTPUTS / "timm_vit").mkdir(exist_ok=True)
    torch.save({"model": net.state_dict()}, OUTPUTS / "timm_vit" / "tiny_patch6_24.pth")     # as DeiT's are
    with torch.no_grad():
        np.savez_compressed(OUTPUTS / "timm_vit" / "io.npz",
                            in_images=image.numpy().transpose(0, 2, 3, 1), out_tokens=net.forward_features(image).numpy())
    store_eva()


def store_eva() -> None:
    """The ViT of transformers' BLIP-2 of an odd size, under the names of LAVIS's file: 40 blocks, of which the last is not used."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    net = official.draw(Blip2VisionModel(Blip2VisionConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=40, num_attention_heads=2, image_size=12,
                                                           patch_size=6, layer_norm_eps=1e-6)), 22)
    names, tensors = net.state_dict(), {}
    with torch.no_grad():
        for layer in net.encoder.layers:
            layer.self_attn.qkv.bias[12:24] = 0
    for name, x in names.items():
        name = name.replace("encoder.layers.", "blocks.").replace("layer_norm", "norm")
        name = name.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
        name = name.replace("embeddings.class_embedding", "cls_token").replace("embeddings.position_embedding", "pos_embed")
        name = name.replace("embeddings.patch_embedding", "patch_embed.proj").replace("post_layernorm", "norm")
        if name.endswith("qkv.bias"):
            tensors[name.replace("qkv.bias", "q_bias")], tensors[name.replace("qkv.bias", "v_bias")] = x[:12].clone(), x[24:].clone()
        else:
            tensors[name] = x
    image, _ = official.inputs(12, 4, 60, 59, 22, (4, 4))
    (OUTPUTS / "eva").mkdir(exist_ok=True)
    torch.save({name: x.half() for name, x in tensors.items()}, OUTPUTS / "eva" / "eva_tiny.pth")
    with torch.no_grad():
        tokens = net(pixel_values=image, output_hidden_states=True).hidden_states[39]
    np.savez_compressed(OUTPUTS / "eva" / "io.npz", in_images=image.numpy().transpose(0, 2, 3, 1), out_tokens=tokens.numpy())


NEW = 7      # ids of a continuation


def store_language() -> None:
    """An OPT, a LLaMA and a T5 of odd sizes, in shards, with what they answer to padded ids and to embeddings in front of ids."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    nets = dict(
        hf_opt=OPTForCausalLM(OPTConfig(vocab_size=96, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=40,
                                        max_position_embeddings=30, bos_token_id=2, eos_token_id=2, pad_token_id=1)),
        hf_llama=LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                                              max_position_embeddings=30, rms_norm_eps=1e-2, rope_theta=1e3, tie_word_embeddings=False, **ends)),
        hf_t5=T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=24, d_kv=6, num_layers=2, num_decoder_layers=2, num_heads=3, d_ff=40,
                                                  layer_norm_epsilon=1e-2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                                                  eos_token_id=1, pad_token_id=0, decoder_start_token_id=0)))
    for seed, (name, net) in enumerate(nets.items(), 30):
        net = official.draw(net, seed)
        net.save_pretrained(OUTPUTS / name, max_shard_size="12KB")
        (OUTPUTS / name / "generation_config.json").unlink(missing_ok=True)
        rng = np.random.default_rng(seed)
        ids, mask = rng.integers(3, 96, (3, 10)), np.arange(10) >= np.array([0, 3, 6])[:, None]
        ids[~mask] = net.config.pad_token_id
        prefix = rng.standard_normal((3, 4, 24)).astype(np.float32)
        ids, mask, prefix = torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(prefix)
        whole, seen = torch.cat([prefix, net.get_input_embeddings()(ids)], 1), torch.cat([torch.ones(3, 4, dtype=torch.bool), mask], 1)
        options = dict(do_sample=False, num_beams=1, max_new_tokens=NEW, min_new_tokens=NEW)
        io = dict(in_ids=ids, in_mask=mask, in_prefix=prefix)
        with torch.no_grad():
            if name == "hf_t5":
                target = torch.from_numpy(np.concatenate([np.zeros((3, 1), np.int64), rng.integers(3, 96, (3, 11))], 1))
                io["in_target"] = target
                for key, given in (("", dict(input_ids=ids, attention_mask=mask.long())), ("prefix_", dict(inputs_embeds=whole, attention_mask=seen.long()))):
                    out = net(**given, decoder_input_ids=target, output_hidden_states=True)
                    io |= {f"out_{key}memory": out.encoder_last_hidden_state, f"out_{key}states": out.decoder_hidden_states[-1], f"out_{key}logits": out.logits}
                    io[f"out_{key}greedy"] = net.generate(**given, **options)[:, 1:]
                    io[f"out_{key}beam"] = net.generate(**given, **{**options, "num_beams": 3})[:, 1:]
                offsets = torch.arange(-200, 201)
                for direction in ("both", "causal"):
                    buckets = net.encoder.block[0].layer[0].SelfAttention._relative_position_bucket(offsets, direction == "both", 32, 128)
                    io[f"out_buckets_{direction}"] = buckets
                net.config.dense_act_fn = "gelu"      # as BLIP-2 runs it
                flipped = T5ForConditionalGeneration(T5Config(**{**net.config.to_dict(), "feed_forward_proj": "gated-gelu"}))
                flipped.load_state_dict(net.state_dict())
                for module in flipped.modules():
                    if hasattr(module, "wi_0"):
                        module.act = torch.nn.GELU()
                io["out_exact_gelu_logits"] = flipped.eval()(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
            else:
                places = (seen.long().cumsum(1) - 1).clamp(min=0)
                for key, given in (("", dict(input_ids=ids, attention_mask=mask.long(), position_ids=places[:, 4:] - 4)),
                                   ("prefix_", dict(inputs_embeds=whole, attention_mask=seen.long(), position_ids=places))):
                    if name == "hf_opt":
                        given.pop("position_ids")      # it counts by itself
                    out = net(**given, output_hidden_states=True)
                    io |= {f"out_{key}states": out.hidden_states[-1], f"out_{key}logits": out.logits}
                    given.pop("position_ids", None)
                    io[f"out_{key}greedy"] = net.generate(**given, **options)[:, -NEW:]
                    io[f"out_{key}beam"] = net.generate(**given, **{**options, "num_beams": 3})[:, -NEW:]
        np.savez_compressed(OUTPUTS / name / "io.npz", **{k: v.numpy().astype({torch.int64: np.int32}.get(v.dtype, v.numpy().dtype)) for k, v in io.items()})


# transformers' BLIP-2 and InstructBLIP of sizes that all differ, each with a language model: its class and the name of a case
EYE = dict(hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=3, image_size=18, patch_size=6, layer_norm_eps=1e-3)
FORMER = dict(hidden_size=20, num_hidden_layers=5, num_attention_heads=2, intermediate_size=36, cross_attention_frequency=2, vocab_size=61,
              max_position_embeddings=16, layer_norm_eps=1e-4)
SPEAKERS = dict(
    opt=dict(model_type="opt", vocab_size=83, hidden_size=30, word_embed_proj_dim=30, num_hidden_layers=2, num_attention_heads=5, ffn_dim=46,
             max_position_embeddings=60, bos_token_id=2, eos_token_id=2, pad_token_id=1),
    t5=dict(model_type="t5", vocab_size=83, d_model=28, d_kv=6, num_layers=3, num_decoder_layers=2, num_heads=3, d_ff=38, layer_norm_epsilon=1e-3,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False, eos_token_id=1, pad_token_id=0, decoder_start_token_id=0,
            bos_token_id=1),
    llama=dict(model_type="llama", vocab_size=83, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=52, rms_norm_eps=1e-3,
               max_position_embeddings=60, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=81))
BLIP2 = {"hf_blip2_opt": ("blip-2", "opt"), "hf_blip2_t5": ("blip-2", "t5"), "hf_blip2_retrieval": ("blip-2", ""), "hf_instructblip_t5": ("instructblip", "t5"),
         "hf_instructblip_llama": ("instructblip", "llama")}
IMAGE_TOKEN, QUERIES = 82, 4


def build_blip2(kind: str, family: str):
    """The model with random weights; a T5's two tables are not tied, as in released files."""
    import transformers as library

    sections = dict(vision_config=dict(EYE), qformer_config={**FORMER, **({"use_qformer_text_input": not family} if kind == "blip-2" else {})},
                    text_config=dict(SPEAKERS[family or "opt"]), num_query_tokens=QUERIES, **(dict(image_token_index=IMAGE_TOKEN) if family else {}))
    config = (library.Blip2Config if kind == "blip-2" else library.InstructBlipConfig)(**sections, image_text_hidden_size=14)
    net = {("blip-2", True): library.Blip2ForConditionalGeneration, ("blip-2", False): library.Blip2ForImageTextRetrieval,
           ("instructblip", True): library.InstructBlipForConditionalGeneration}[kind, bool(family)](config)
    if family == "t5":
        net.language_model.lm_head.weight = torch.nn.Parameter(torch.empty(SPEAKERS["t5"]["vocab_size"], SPEAKERS["t5"]["d_model"]))
    return net


def blip2_inputs(kind: str, family: str, seed: int) -> dict[str, torch.Tensor]:
    """What its ``forward`` takes: decoders' prompts are padded on the left, behind the image."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.standard_normal((3, 3, 18, 18)).astype(np.float32))
    words = torch.from_numpy(np.where(np.arange(9) < np.array([9, 5, 3])[:, None], rng.integers(3, 61, (3, 9)), 0))
    if not family:
        return dict(pixel_values=image, input_ids=words, attention_mask=(words != 0).long())
    pad = SPEAKERS[family]["pad_token_id"]
    real = torch.arange(7) >= torch.tensor([0, 2, 4])[:, None]
    real = real.flip(1) if family == "t5" else real
    ids = torch.where(real, torch.from_numpy(rng.integers(3, 80, (3, 7))), pad)
    seen, ones = torch.full((3, QUERIES), IMAGE_TOKEN), torch.ones(3, QUERIES, dtype=torch.long)
    out = dict(pixel_values=image, input_ids=torch.cat([seen, ids], 1), attention_mask=torch.cat([ones, real.long()], 1))
    if kind == "instructblip":
        out |= dict(qformer_input_ids=words, qformer_attention_mask=(words != 0).long())
    if family == "t5":
        out["decoder_input_ids"] = torch.from_numpy(np.concatenate([np.zeros((3, 1), np.int64), rng.integers(3, 80, (3, 5))], 1))
    return out


def blip2_answers(net, family: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits and texts, or scores."""
    with torch.no_grad():
        if not family:
            match, cosine = (net(**given, use_image_text_matching_head=head) for head in (True, False))
            return dict(match=match.logits_per_image, cosine=cosine.logits_per_image)
        # forward counts padding as positions, generate does not
        places = dict(position_ids=(given["attention_mask"].cumsum(1) - 1).clamp(min=0)) if family == "llama" else {}
        out = dict(logits=net(**given, **places).logits)
        given = {k: v for k, v in given.items() if k != "decoder_input_ids"}
        for name, beams in (("greedy", 1), ("beam", 3)):
            out[name] = net.generate(**given, do_sample=False, num_beams=beams, max_new_tokens=NEW)[:, -NEW:]
        if family == "llama":
            out["penalised"] = penalised(net, given)
        return out


def penalised(net, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Greedy ids as LAVIS's release of transformers wrote them: the penalty of 1.5 is for what was written and for the model's own begin, which stands in
    front of it and is never read; the prompt is free of it."""
    given, written = dict(given), torch.full((3, 1), net.config.text_config.bos_token_id)
    for _ in range(NEW):
        places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        scores = net(**given, position_ids=places).logits[:, -1]
        seen = scores.gather(1, written)
        new = scores.scatter(1, written, torch.where(seen < 0, seen * 1.5, seen / 1.5)).argmax(1, keepdim=True)
        written = torch.cat([written, new], 1)
        given["input_ids"] = torch.cat([given["input_ids"], new], 1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
    return written[:, 1:]


def store_blip2() -> None:
    for seed, (name, (kind, family)) in enumerate(BLIP2.items(), 40):
        net = official.draw(build_blip2(kind, family), seed)
        with torch.no_grad():
            for layer in net.vision_model.encoder.layers:
                layer.self_attn.qkv.bias[24:48] = 0
        net.save_pretrained(OUTPUTS / name, max_shard_size="60KB")
        (OUTPUTS / name / "generation_config.json").unlink(missing_ok=True)
        given = blip2_inputs(kind, family, seed)
        io = {f"in_{k}": v for k, v in given.items()} | {f"out_{k}": v for k, v in blip2_answers(net, family, given).items()}
        np.savez_compressed(OUTPUTS / name / "io.npz", **{k: v.numpy().astype({torch.int64: np.int32}.get(v.dtype, v.numpy().dtype)) for k, v in io.items()})


def mean_of_tokens(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """states [b, l, width] -> unit [b, width]."""
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def sentences(directory: str) -> float:
    """Largest difference of the sentences' embeddings, each side with its own tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(directory)(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = mean_of_tokens(AutoModel.from_pretrained(directory).eval()(**words).last_hidden_state.numpy(), words["attention_mask"].numpy())
    with tempfile.TemporaryDirectory() as work:
        model = vlm_jax.load(cli.import_release("hf_bert", directory, pathlib.Path(work) / "in"))
    ids, mask = model.ids(SENTENCES)
    length = words["input_ids"].shape[1]
    assert np.array_equal(ids[:, :length], words["input_ids"].numpy()) and not mask[:, length:].any()
    ours = mean_of_tokens(model.predict["features"]({"text": ids[:, :length], "text_mask": mask[:, :length]})["text"], mask[:, :length])
    print(f"{len(ours)} sentences, width {ours.shape[1]}, cosine of the first two {ours[0] @ ours[1]:.4f}")
    return float(np.abs(ours - theirs).max())


def exports() -> dict[str, float]:
    """Largest difference, by answer, of transformers' models opened from our exports from our own."""
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipImageProcessor

    out = {}
    for name, kind in (("hf_blip_caption", BlipForConditionalGeneration), ("hf_blip_retrieval", BlipForImageTextRetrieval)):
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            imported = cli.import_release("hf_blip", str(OUTPUTS / name), work / "in", say=quiet)
            folder, model, io = cli.export_release("hf_blip", imported, work / "out", say=quiet), vlm_jax.load(imported), np.load(OUTPUTS / name / "io.npz")
            net = kind.from_pretrained(folder).eval()
            seen = np.asarray(official.inputs(16, 4, 60, 59, 0, (4,))[0].numpy().transpose(0, 2, 3, 1)[0] * 40 + 128).clip(0, 255).astype(np.uint8)
            pixels = BlipImageProcessor.from_pretrained(folder)(seen, return_tensors="pt")["pixel_values"].numpy().transpose(0, 2, 3, 1)
        model_pixels = (model.images(seen) / 255 - np.array(model.config.model.mean)) / np.array(model.config.model.std)
        out[f"{name}: pixels"] = np.abs(pixels - model_pixels).max()
        ids, mask, images = (io[f"in_{k}"] for k in ("input_ids", "attention_mask", "images"))
        batch = {"image": images.transpose(0, 2, 3, 1), "text": ids, "text_mask": mask.astype(bool)}
        given = dict(pixel_values=torch.from_numpy(images), input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
        with torch.no_grad():
            if kind is BlipForConditionalGeneration:
                given["input_ids"][:, 0] = net.config.text_config.bos_token_id      # [DEC]; ours puts it there itself
                difference = np.abs(net(**given).logits.numpy() - model.predict["caption_logits"](batch)["logits"])
                out[f"{name}: logits"] = difference[batch["text_mask"]].max()
                theirs = net.generate(given["pixel_values"], max_length=10, do_sample=False, num_beams=1).numpy()[:, 1:]
                out[f"{name}: ids"] = (theirs != model.predict["generate"](batch, max_length=10)["text"][:, 1:]).sum()
            else:
                out[f"{name}: match"] = np.abs(net(**given).itm_score.numpy() - model.predict["match"](batch, first="cls")["match"]).max()
                embeds = model.predict["embed"](batch)
                out[f"{name}: cosine"] = np.abs(net(**given, use_itm_head=False).itm_score.numpy() - embeds["image_embed"] @ embeds["text_embed"].T).max()
    return {name: float(x) for name, x in (out | blip2_exports()).items()}


def blip2_exports() -> dict[str, float]:
    """Largest difference of the answers of transformers' models opened from our exports from those that were stored."""
    import transformers as library

    out = {}
    for name, (kind, family) in BLIP2.items():
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            imported = cli.import_release("hf_blip2", str(OUTPUTS / name), work / "in", say=quiet)
            folder = cli.export_release("hf_blip2", imported, work / "out", say=quiet)
            model = getattr(library, json.loads((folder / "config.json").read_text())["architectures"][0])
            net, told = model.from_pretrained(folder, output_loading_info=True)
            assert not told["missing_keys"] and not told["unexpected_keys"], told
            if kind == "blip-2" and family:
                library.Blip2Model.from_pretrained(folder)
        net, io = net.eval(), np.load(OUTPUTS / name / "io.npz")
        given = {k.removeprefix("in_"): torch.from_numpy(x) for k, x in io.items() if k.startswith("in_")}
        given = {k: x.long() if x.dtype == torch.int32 else x for k, x in given.items()}
        for key, x in blip2_answers(net, family, given).items():
            wanted = io[f"out_{key}"]
            ids = key in ("greedy", "beam", "penalised")
            out[f"{name}: {key}"] = (cut(x.numpy(), net) != cut(wanted, net)) if ids else np.abs(x.numpy() - wanted)[attended(x, given)].max()
    return out


def attended(x: torch.Tensor, given: dict[str, torch.Tensor]) -> np.ndarray:
    """Where logits [b, l, v] stand on real tokens."""
    mask = given["attention_mask"].numpy().astype(bool)
    return mask if x.shape[:2] == mask.shape and "decoder_input_ids" not in given else np.ones(x.shape[:1], bool)


def cut(ids: np.ndarray, net) -> list[list[int]]:
    """Rows up to their first end; what fills them differs between versions."""
    end = net.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    return [row[:row.index(end)] if end in row else row for row in ids.tolist()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity.hugging_face", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("store", "store_language", "store_blip2", "exports", "blip2_exports", "sentences"))
    parser.add_argument("directory", nargs="?", default="")
    args = parser.parse_args()
    if args.what.startswith("store"):
        {"store": store, "store_language": store_language, "store_blip2": store_blip2}[args.what]()
        return 0
    found = {"exports": exports, "blip2_exports": blip2_exports}[args.what]() if args.what.endswith("exports") else {"sentences": sentences(args.directory)}
    for name, difference in found.items():
        print(f"{name}: largest difference {difference:.1e}")
    return int(max(found.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
