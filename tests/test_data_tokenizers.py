"""Tokenizers: ids equal to the releases', padding and truncation, saving, training, errors."""

import json
import os

import numpy as np
import pytest

from vlm_jax.data import tokenizers
from vlm_jax.data.tokenizers import load, train

WORDS = ("red", "blue", "green", "small", "large", "cat", "dog", "house", "heart", "face")
TEXTS = [f"a {a} {b} beside the {c}" for a in WORDS for b in WORDS for c in WORDS[:5]]
CLIP_IDS = {  # computed once with open_clip_torch 3.3.0's SimpleTokenizer
    'a photo of a cat': [320, 1125, 539, 320, 2368],
    'A  Photo\tof\n a CAT!!': [320, 1125, 539, 320, 2368, 748],
    "it's we're I'LL they'd O'Neil": [585, 568, 649, 982, 328, 1342, 889, 1896, 334, 262, 8030],
    '日本語のテキスト': [39121, 44353, 34002, 252, 21575, 2429, 228, 47121, 32421, 486],
    'I ❤️ 🐈\u200d⬛ 👩🏽\u200d🚀': [328, 1752, 2074, 230, 4244, 7930, 505, 18800, 8514, 4244, 13542],
    'Fish &amp;amp; chips &lt;b&gt;': [2759, 261, 8855, 283, 321, 285],
    'schÃ¶n cafÃ©': [844, 7255, 333, 15304],
    '2024-11-25 at 10:30': [273, 271, 273, 275, 268, 272, 272, 268, 273, 276, 536, 272, 271, 281, 274, 271],
    'Ünïcödé ÉCOLE straße İstanbul': [6522, 77, 35689, 66, 7255, 67, 4166, 3459, 8166, 1894, 127, 253, 324, 328, 16384, 11231],
    'مرحبا بالعالم': [12986, 10948, 25722, 16378, 22625, 16378, 12973, 18843, 12973, 29945],
    'don’t “quote” … ﬁne': [847, 713, 257, 4020, 257, 959, 3797],
}


@pytest.fixture(scope="module")
def clip():
    path = os.environ.get("CLIP_VOCABULARY")
    try:
        return load(f"clip:{path}" if path else "clip")
    except FileNotFoundError as error:
        pytest.skip(f"{error}; or set CLIP_VOCABULARY to the file")


@pytest.fixture(scope="module")
def pieces():
    return train(TEXTS, 1000)


def test_clip_ids_are_those_of_the_release(clip):
    expected = {t: ids for t, ids in CLIP_IDS.items() if clip.cleans_with_ftfy or not set(t) & set("Ã’ﬁ")}
    assert {text: clip.encode(text)[1:-1] for text in expected} == expected


def test_clip_pads_with_zero_and_cuts_with_end(clip):
    assert (clip.vocab_size, clip.pad_id, clip.bos_id, clip.eos_id) == (49408, 0, 49406, 49407)
    ids, mask, cut = clip(["a cat", "a cat " * 50, ""], 77)
    assert ids.shape == mask.shape == (3, 77) and ids.dtype == np.int32 and cut == 1
    assert ids[0, :5].tolist() == [49406, 320, 2368, 49407, 0] and mask[0].sum() == 4
    assert ids[1, -1] == 49407 and mask[1].all() and ids[1, -2] == 320
    assert ids[2, :3].tolist() == [49406, 49407, 0] and (ids[2].argmax() == 1)


def test_clip_decodes(clip):
    for text in ("a photo of a cat", "don't stop ! 123", "日本語 ❤", "!"):
        ids, _, _ = clip([text], 32)
        assert clip.decode(ids[0]).replace(" ", "") == text.replace(" ", "")
    assert clip.decode([49406, 320, 49407, 2368]) == "a"


def test_clip_cleans_without_ftfy(clip, monkeypatch):
    monkeypatch.setattr(tokenizers, "_ftfy", lambda: None)
    plain = tokenizers.ClipTokenizer(clip._vocabulary)
    assert not plain.cleans_with_ftfy
    assert plain.clean("A &amp;amp; B\n  &lt;b&gt; ") == "a & b <b>"
    assert plain.encode("a photo of a cat") == clip.encode("a photo of a cat")


def test_clip_travels_with_a_checkpoint(clip, tmp_path):
    clip.save(tmp_path)
    assert load(str(tmp_path)).encode("Fish & chips 🐟") == clip.encode("Fish & chips 🐟")


def test_clip_without_its_file_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizers, "CLIP_PACKAGES", ("no_such_package",))
    with pytest.raises(FileNotFoundError, match="install open_clip_torch, or name the file"):
        load("clip")
    with pytest.raises(FileNotFoundError, match="is not at"):
        load(f"clip:{tmp_path}/none.gz")


def test_clip_file_is_found_without_importing_its_package(monkeypatch, tmp_path):
    (tmp_path / "fake_clip").mkdir()
    (tmp_path / "fake_clip" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fake_clip" / tokenizers.CLIP_FILE).write_bytes(b"found")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tokenizers, "CLIP_PACKAGES", ("no_such_package", "fake_clip"))
    assert tokenizers._find_clip_vocabulary() == b"found"


def test_sentencepiece_round_trip(pieces, tmp_path):
    ids = pieces.encode("A Red CAT")
    assert ids[0] == pieces.bos_id == 1 and ids[-1] == pieces.eos_id == 2 and pieces.pad_id == 0
    assert pieces.decode(ids) == "a red cat"
    assert pieces.decode(pieces.encode("ünseen 漢")) == "ünseen 漢"  # bytes stand in for unseen characters
    rows, mask, cut = pieces(["a red cat", "a red cat " * 20], 12)
    assert cut == 1 and rows[1, -1] == 2 and mask[1].all() and (rows[0][~mask[0]] == 0).all()
    assert pieces.decode(rows[0]) == "a red cat"
    pieces.save(tmp_path / "t")
    again = load(str(tmp_path / "t"))
    assert again.encode("a red cat") == ids[:1] + pieces.encode("a red cat")[1:] and again.kind == "sentencepiece"
    assert load(f"sentencepiece:{tmp_path}/t/sentencepiece.model").encode("a dog") == pieces.encode("a dog")


def test_sentencepiece_of_other_makers(tmp_path):
    import io

    import sentencepiece
    for ids, bos, eos, pad in (({"pad_id": 0, "eos_id": 1, "bos_id": -1, "unk_id": 2}, None, 1, 0),    # T5
                               ({"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}, 1, 2, 0)):      # Llama
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=out, vocab_size=100,
                                                 hard_vocab_limit=False, minloglevel=2, num_threads=1, **ids)
        (tmp_path / "m.model").write_bytes(out.getvalue())
        tokenizer = load(f"sentencepiece:{tmp_path}/m.model")
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, pad)
        row = tokenizer.encode("a red cat")
        assert (row[0] == bos) == (bos is not None) and row[-1] == eos
        assert tokenizer.decode(tokenizer(["a red cat"], 20)[0][0]) == "a red cat"


def test_training_is_repeatable_and_keeps_to_its_limit(pieces):
    assert train(TEXTS, 1000)._model == pieces._model
    assert pieces.vocab_size < 500  # an upper limit, not a demand
    small = train(TEXTS, 200)  # no room for bytes: unseen characters are unknown
    assert small.vocab_size < 200 and 3 in small.encode("漢") and len(small.encode("a red cat")) == 5
    with pytest.raises(ValueError, match="vocab=10.*smaller than required_chars"):
        train(TEXTS, 10)


def test_train_command_on_a_file_and_on_a_source(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(TEXTS))
    tokenizers.main(["train", f"--input={tmp_path}/captions.txt", "--vocab=320", f"--out={tmp_path}/one"])
    assert "pieces" in capsys.readouterr().out
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"image": "x.png", "text": t}) for t in TEXTS) + "\nbroken\n")
    tokenizers.main(["train", f"--input=jsonl:{tmp_path}/d.jsonl", "--vocab=320", f"--out={tmp_path}/two"])
    one, two = load(str(tmp_path / "one")), load(str(tmp_path / "two"))
    assert one.encode("a red cat") == two.encode("a red cat") and len(one.encode("a red cat")) == 5
    assert tokenizers.main(["train", f"--input=folder:{tmp_path}", f"--out={tmp_path}/three"]) == 43
    assert "error: folder:" in (err := capsys.readouterr().err) and "holds no image" in err


def test_tokenizer_json(tmp_path):
    import tokenizers as hf
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s"])}
    model = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    model.post_processor = hf.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    model.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    model.enable_truncation(4)  # a file's own limits must not cut in silence
    model.enable_padding(length=9)
    model.save(str(tmp_path / "tokenizer.json"))
    for name in (f"hf:{tmp_path}/tokenizer.json", f"hf:{tmp_path}"):
        tokenizer = load(name)
        assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (8, 0, 2, 3)
        assert tokenizer.encode("A red CATS") == [2, 4, 5, 6, 7, 3]
    ids, mask, cut = tokenizer(["a red cats", "a"], 5)
    assert ids.tolist() == [[2, 4, 5, 6, 3], [2, 4, 3, 0, 0]] and cut == 1 and mask.sum() == 8
    assert tokenizer.decode(ids[0]) == "a red cat"
    tokenizer.save(tmp_path / "saved")
    assert load(str(tmp_path / "saved")).encode("a cats") == tokenizer.encode("a cats")


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nearest: 'clip'"):
        load("clipp")
    with pytest.raises(FileNotFoundError, match="not at"):
        load("sentencepiece:/none.model")
    with pytest.raises(FileNotFoundError, match="not at"):
        load("hf:./none.json")
    with pytest.raises(FileNotFoundError, match="description"):
        load(str(tmp_path))
    (tmp_path / tokenizers.DESCRIPTION).write_text('{"kind": "sentencepeace"}')
    with pytest.raises(ValueError, match="nearest: 'sentencepiece'"):
        load(str(tmp_path))
